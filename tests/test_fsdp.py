"""trainer=fsdp: sharded over two processes, a training and its checkpoints are those of a single process."""

import os
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
import ranks
import torch
from PIL import Image
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import lit_gen
from lit_gen import checkpoints, runs, sharding
from lit_gen.callbacks import EMA, NotFiniteError
from lit_gen.commands.consolidate import consolidate
from lit_gen.config.experiment import build
from lit_gen.errors import ConfigError
from lit_gen.module import clip_gradients
from lit_gen.score.networks import ADM, DDPM, EDM2, NCSN, DiT, NCSNpp, NCSNv2, NoisyClassifier, UViT

FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "logger=csv"]
# Whatever draws random numbers in a step; scalar parameters, and others outside of the network.
EDM2_RUN = [
    "experiment=digits_vp",
    "model=edm2",
    "model.num_classes=10",
    "model.label_dropout=0.2",
    "model.net.dropout=0",
    "trainer.gradient_clip_val=0.5",
]
EDM2_RUN += ["model.net.attention_resolutions=[8]", "model.optimizer.lr=0.01"]
SHORT = ["trainer.max_steps=6", "callbacks.checkpoint.every=3", "callbacks.validation.every=6"]
SHORT += ["callbacks.quality.every=6", "callbacks.grid.every=6", "callbacks.quality.final_images=32"]
SHORT += ["data.batch_size=126"]  # by two and by three


trained = partial(ranks.trained, by=FSDP)


def state(folder, name="last"):
    return checkpoints.read(checkpoints.folder(folder) / f"{name}.ckpt")


def assert_close(a, b, at="", **tolerances):
    """Nested containers with the same keys and numbers; bit for bit without tolerances."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_close(a[key], b[key], f"{at}/{key}", **tolerances)
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{at}/{i}", **tolerances)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(b, a, **(tolerances or {"rtol": 0, "atol": 0}), msg=lambda m: f"{at}: {m}")
    elif isinstance(a, float):
        assert b == (pytest.approx(a, rel=1e-4) if tolerances else a), at
    else:
        assert a == b, at


def again(run, folder, name="previous"):
    """A run folder with one checkpoint of another run."""
    checkpoints.folder(folder).mkdir(parents=True)
    shutil.copyfile(run / "config.yaml", folder / "config.yaml")
    shutil.copytree(checkpoints.folder(run) / f"{name}.ckpt", checkpoints.folder(folder) / "last.ckpt")
    return folder


@pytest.mark.slow
def test_a_teacher_is_sharded_with_its_pupil(compose, tiny, tmp_path, on_ranks):
    small = [o for o in tiny if "sampler" not in o] + ["model.net.dropout=0", *SHORT]
    one = ["trainer=cpu", "logger=csv"]
    trained(compose, tmp_path / "start", *small, by=one)
    distilled = ["experiment=digits_ect", *small, "model.loss.distill=true", f"weights={tmp_path / 'start'}"]
    trained(compose, tmp_path / "one", *distilled, by=one)
    on_ranks(2, partial(trained, compose, tmp_path / "two", *distilled))
    whole, put_together = state(tmp_path / "one"), state(tmp_path / "two")
    assert whole["state_dict"]["loss.started"]
    for part in TRAINING:
        assert_close(whole[part], put_together[part], part, rtol=1e-3, atol=1e-4)


@pytest.fixture
def two(on_ranks, compose, tiny, tmp_path):
    """The tiny experiment of EDM2 by two processes, 6 steps, saved at 3 and 6."""
    on_ranks(2, partial(trained, compose, tmp_path / "two", *tiny, *EDM2_RUN, *SHORT))
    return tmp_path / "two"


TRAINING = ("state_dict", "optimizer_states", "callbacks", "lr_schedulers", "batches_seen")


def test_two_processes_equal_one_and_resume(two, compose, tiny, tmp_path, on_ranks):
    one = tmp_path / "one"
    trained(compose, one, *tiny, *EDM2_RUN, *SHORT, by=["trainer=cpu", "logger=csv"])
    a, b = runs.history(one), runs.history(two)
    names = [n for n in a if not n.startswith(("throughput", "memory", "summary"))]
    assert {"train/loss", "train/grad_norm", "train/loss_noise_q1", "val/loss"} <= set(names)
    assert max(a["train/grad_norm"].values()) > 0.5  # clipped
    for name in names:
        assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    whole, put_together = state(one), state(two)
    assert whole.keys() == put_together.keys()
    for part in TRAINING:
        assert_close(whole[part], put_together[part], part, rtol=1e-3, atol=1e-5)
    for name in ("grid_0000006.png", "trajectory_0000006.png"):
        pictures = [np.asarray(Image.open(run / "grids" / name)).astype(int) for run in (one, two)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1, name

    # Every command takes a sharded checkpoint, and the one file that is made of it.
    out = consolidate(compose(f"run={two}", "checkpoint=last", config_name="consolidate"))
    assert out == two / "last.ckpt"
    assert_close(put_together, checkpoints.read(out))
    images = [lit_gen.load(run, checkpoint="last").sample(4, seed=3) for run in (two, out, one)]
    assert torch.equal(images[0], images[1])
    assert (images[0].int() - images[2].int()).abs().max() <= 1
    for again, message in ((two, "last.ckpt exists"), (out, "is one file already")):
        with pytest.raises(ConfigError, match=message):
            consolidate(compose(f"run={again}", "checkpoint=last", config_name="consolidate"))

    # What is damaged is named, and passed over.
    last = checkpoints.folder(two) / "last.ckpt"
    index, part = last / ".metadata", last / "__1_0.distcp"
    whole = part.read_bytes()
    part.unlink()  # the others have the same file
    part.write_bytes(whole[:-100])
    path, _, bad = checkpoints.newest_good(two)
    assert path.name in ("best.ckpt", "previous.ckpt")
    assert "__1_0.distcp is missing or truncated" in bad[0]
    weight = put_together["state_dict"]["denoiser.net.stem.weight"].chunk(2)[1]
    at = whole.index(weight.contiguous().numpy().tobytes())
    part.write_bytes(whole[:at] + bytes(4) + whole[at + 4 :])
    with pytest.raises(ConfigError, match=r"damaged \(checksum of __1_0.distcp"):
        checkpoints.read(last)
    part.write_bytes(whole)
    index.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ConfigError, match=r"asks for posix.system, which was refused, not run"):
        checkpoints.read(last)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.slow
def test_resumes_bit_for_bit_on_as_many_processes_and_to_rounding_on_others(two, compose, on_ranks, tmp_path):
    on_ranks(2, partial(trained, compose, again(two, tmp_path / "again"), resume=True))
    on_ranks(3, partial(trained, compose, again(two, tmp_path / "three"), resume=True))
    trained(compose, again(two, tmp_path / "alone"), resume=True)  # not sharded
    assert (checkpoints.folder(tmp_path / "alone") / "last.ckpt").is_file()
    for part in TRAINING:
        assert_close(state(two)[part], state(tmp_path / "again")[part], part)
        for other in ("three", "alone"):
            assert_close(state(two)[part], state(tmp_path / other)[part], part, rtol=1e-3, atol=1e-5)


SMALL = {"image_size": 8, "base_channels": 8, "num_blocks": 1, "dropout": 0.0}
NETWORKS = [
    lambda: ADM(**SMALL, channel_mult=(1, 2), attention_resolutions=(4,), checkpoint_blocks=True),
    lambda: DDPM(**SMALL, channel_mult=(1, 2), attention_resolutions=(4,)),
    lambda: EDM2(**SMALL, channel_mult=(1, 2), attention_resolutions=(4,)),
    lambda: EDM2(**SMALL, channel_mult=(1, 2), attention_resolutions=(4,), checkpoint_blocks=True),
    lambda: NCSNpp(**SMALL, channel_mult=(1, 2), input_pyramid="residual", fir=(1, 3, 3, 1)),
    lambda: NCSNpp(**SMALL, channel_mult=(1, 2), input_pyramid="skip", output_pyramid="skip"),
    lambda: UViT(8, 3, 2, 16, 4, 2),
    lambda: DiT(8, 3, 2, 16, 2, 2, checkpoint_blocks=True),
    lambda: NCSN(image_size=8, base_channels=8, num_levels=3),
    lambda: NCSNv2(image_size=8, base_channels=8),
    lambda: NoisyClassifier(**SMALL, num_classes=3, channel_mult=(1, 2), attention_resolutions=(4,)),
]


def same_network(make, compiled=False):
    """Outputs, gradients, their norm and clipping, averages: of halves of a batch on two processes, and of
    all of it on one."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    one, two = make().double(), make().double()
    for p in one.parameters():
        torch.nn.init.normal_(p, std=0.1)  # many are zero at first
    two.load_state_dict(one.state_dict())
    sharding.shard(two, mesh)
    if compiled:
        for unit in sharding.units(two):
            unit.forward = torch.compile(unit.forward, backend="aot_eager")
    x, noise = torch.randn(4, 3, 8, 8).double(), torch.tensor([0.0, 1.0, 2.0, 1.0]).double()
    average = EMA(0.5, warmup=False)
    weights = dict(two.named_parameters())
    average.shadow = {name: w.detach().clone() for name, w in weights.items()}
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01, fused=True) for net in (one, two)]
    for _ in range(2):
        out, half = one(x, noise), two(x.chunk(2)[rank], noise.chunk(2)[rank])
        torch.testing.assert_close(half, out.chunk(2)[rank], rtol=1e-6, atol=1e-9)
        out.square().mean().backward()
        half.square().mean().backward()
        sharding.average_gradients(two.parameters())
        norms = [clip_gradients(net.parameters(), 0.1) for net in (one, two)]
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=1e-9)
        for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(sharding.whole(b.grad), a.grad, rtol=1e-6, atol=1e-9, msg=name)
        optimizers[0].step()
        with sharding.mixing(two.parameters()):
            optimizers[1].step()
        average.update(weights)
        for net in (one, two):
            net.zero_grad()
    two.eval()
    with torch.no_grad(), average.applied(two), sharding.gathered(two):
        calls = [two(x, noise) for _ in range(1 + rank)]  # each process as often as it likes
        averaged = {name: w.clone() for name, w in two.named_parameters()}
    for name, w in average.shadow.items():
        torch.testing.assert_close(averaged[name], sharding.whole(w), rtol=0, atol=0)
    one.eval()
    with torch.no_grad():
        for name, w in one.named_parameters():
            w.copy_(averaged[name])
        torch.testing.assert_close(calls[-1], one(x, noise), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=() if i == 3 else pytest.mark.slow) for i in range(len(NETWORKS))]
)
def test_every_network_is_sharded_right(number, on_ranks):
    on_ranks(2, same_network, NETWORKS[number])


@pytest.mark.slow
def test_blocks_are_compiled_one_by_one(on_ranks):
    on_ranks(2, same_network, NETWORKS[2], True)


# --- what cannot be ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["experiment=funit_glyphs"], "not a FUNITModule: take trainer=ddp"),
        (["experiment=detector_scenes"], "not a Detect.*: take trainer=ddp"),
        (["model/loss=sliced", "experiment=digits_vp"], "second derivative"),
        (["model.channels_last=true"], "model.channels_last=true: sharded weights are contiguous"),
        (["trainer.precision=16-mixed"], "trainer=fsdp takes bf16-mixed or 32-true"),
    ],
)
def test_refused_before_the_training(options, message, compose, tmp_path):
    with pytest.raises(ConfigError, match=message):
        build(compose(*FSDP, "trainer.devices=1", f"logger.csv.save_dir={tmp_path}", *options), tmp_path)


def elsewhere(compose, folder, tiny):
    """The second process's run folder is on a machine of its own."""
    with pytest.raises(ConfigError, match=r"1 of 2 processes do not see the run folder .*hydra.run.dir"):
        exists = os.path.exists
        if dist.get_rank():
            checkpoints.Path.exists = lambda path: ".shared-test" not in path.name and exists(path)
        trained(compose, folder, *tiny)


def test_a_run_folder_that_is_not_shared_is_refused(on_ranks, compose, tiny, tmp_path):
    on_ranks(2, elsewhere, compose, tmp_path / "run", tiny)


def diverges(compose, folder, tiny):
    options = ["model.optimizer.lr=1e30", "callbacks.checkpoint.every=1", "~callbacks.quality"]
    good = r"last good checkpoint is .*last.ckpt" if dist.get_rank() == 0 else "not finite"
    with pytest.raises(NotFiniteError, match=good):
        trained(compose, folder, *[o for o in tiny if ".quality." not in o], *options)


def test_no_nan_is_saved(on_ranks, compose, tiny, tmp_path):
    on_ranks(2, diverges, compose, tmp_path / "run", tiny)
    saved = state(tmp_path / "run")
    assert saved["batches_seen"] >= 1
    assert all(w.isfinite().all() for w in saved["state_dict"].values())
