"""The search by the command line: goes on where it ended, overwrites nothing, and what it finds is of use."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lit_gen.augment import AutoAugment, Policy
from lit_gen.commands import search as searching
from lit_gen.data.digits import digits
from lit_gen.errors import ConfigError
from lit_gen.instantiate import instantiate
from lit_gen.rng import keyed_generator
from lit_gen.search import TPE, Labelled, density_folds, merge, run
from lit_gen.search.density import stratified_split
from lit_gen.search.tasks import classifier, detector

SYNTHETIC = ["space.num_sub_policies=2", "test_children=1", "wandb=disabled", "strategy.batch=4"]
CHILD = ["reward.child.epochs=1", "reward.train_size=60", "reward.validation_size=50", "test_children=1"]


def trials(folder, name="ledger"):
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()[1:]]
    return [(t["number"], t["choices"], t["reward"]) for t in lines]


def test_a_search_in_two_parts_is_the_search_in_one(compose, tmp_path):
    """Also of the random control; the report counts what was paid."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    searching.search(compose(*SYNTHETIC, "budget=10", config_name="search"), whole)
    for budget in (3, 10):
        report = searching.search(compose(*SYNTHETIC, f"budget={budget}", config_name="search"), parts)
    assert trials(parts) == trials(whole) and trials(parts, "random") == trials(whole, "random")
    assert len(trials(whole)) == 10 and report["results"]["found"]["child_models"] == 10
    assert trials(whole) != trials(whole, "random")
    for name in ("policy.yaml", "augment/found.yaml"):
        assert (parts / name).read_text().split("ops:")[1] == (whole / name).read_text().split("ops:")[1]
    assert report["results"]["found"]["test"] == pytest.approx(
        json.loads((whole / "report.json").read_text())["results"]["found"]["test"]
    )


def test_seeds_are_searches_of_their_own(compose, tmp_path):
    """The table over seeds is made of the scores of each; what is finished is not done again."""
    given = [*SYNTHETIC, "budget=4", "seed=3", "seeds=2"]
    report = searching.search(compose(*given, config_name="search"), tmp_path / "many")
    for seed in (3, 4):
        alone = searching.search(
            compose(*SYNTHETIC, "budget=4", f"seed={seed}", config_name="search"), tmp_path / str(seed)
        )
        folder = tmp_path / "many" / f"seed_{seed}"
        assert trials(folder) == trials(tmp_path / str(seed))
        for name, row in report["results"].items():
            assert row["test"][seed - 3] == pytest.approx(alone["results"][name]["test"])
    row = report["results"]["found"]
    assert row["gain_mean"] == pytest.approx(sum(row["gain"]) / 2) and row["better"] == 2
    before = (tmp_path / "many" / "seed_3" / "curve.png").stat().st_mtime_ns
    assert searching.search(compose(*given, config_name="search"), tmp_path / "many") == report
    assert (tmp_path / "many" / "seed_3" / "curve.png").stat().st_mtime_ns == before


def test_randaugment_beside_the_search(compose, tmp_path):
    """As many cells as the budget allows, all different, under the same reward."""
    common = ["wandb=disabled", "strategy=random", "space=small", "data=digits", *CHILD, "reward=classifier"]
    common += ["+compare.AugMix={_target_: lit_gen.augment.AugMix}", "reward.child.consistency=12"]
    cfg = compose(*common, "budget=5", "randaugment=true", config_name="search")
    report = searching.search(cfg, tmp_path)
    assert report["results"]["AugMix"].keys() == {"test", "test_scores"}
    cells = trials(tmp_path, "randaugment")
    row = report["results"]["RandAugment, best of its grid"]
    assert len({tuple(c) for _, c, _ in cells}) == len(cells) == row["child_models"] == 4
    assert row["reward"] == max(r for _, _, r in cells)


def test_what_was_found_can_be_used(compose, tmp_path):
    """policy.yaml and augment/found.yaml are the three best policies of the trial log, one after another."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    cfg = compose(*SYNTHETIC, "budget=8", "random_baseline=false", config_name="search")
    searching.search(cfg, tmp_path)
    space = instantiate(cfg.space)
    best = sorted(trials(tmp_path), key=lambda t: (-t[2], t[0]))[:3]
    expected = tuple(sub for _, choices, _ in best for sub in space.decode(choices).sub_policies)
    assert Policy.load(tmp_path / "policy.yaml").sub_policies == expected
    from lit_gen.cli import CONF_DIR

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        path = f"hydra.searchpath=[file://{tmp_path}]"
        node = hydra_compose("train", [path, "augment=found"]).data.augment
    transform = instantiate(node)
    assert isinstance(transform, AutoAugment) and transform.policy.sub_policies == expected


def test_what_was_found_for_generative_training_can_be_used(compose, tmp_path):
    """model/augment/found.yaml is the best of the trial log, and the network takes as many labels."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from lit_gen.cli import CONF_DIR

    child = "reward.child={steps: 2, batch_size: 4, width: 8, learning_rate: 1e-3}"
    sizes = [f"reward.{name}_size=20" for name in ("train", "validation", "test")]
    common = ["wandb=disabled", "reward=generative", "space=conditional", "data=digits", "strategy=random"]
    common += [child, *sizes, "reward.num_steps=2", "budget=3", "test_children=1"]
    cfg = compose(*common, config_name="search")
    report = searching.search(cfg, tmp_path)
    assert report["unit"] == "negative FD" and report["results"].keys() == {"none", "EDM's", "found"}
    best = instantiate(cfg.space).decode(max(trials(tmp_path), key=lambda t: (t[2], -t[0]))[1])
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        path = f"hydra.searchpath=[file://{tmp_path}]"
        model = hydra_compose("train", [path, "model/augment=found"]).model
    assert instantiate(model.augment).draw(50, torch.Generator()).keys() == best.draw(1).keys()
    assert {**vars(instantiate(model.augment)), "untold": best.untold} == vars(best)
    assert model.net.augment_dim == best.label_dim


def test_another_search_is_not_overwritten(compose, tmp_path):
    searching.search(compose(*SYNTHETIC, "budget=4", "random_baseline=false", config_name="search"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    for change, word in (("seed=1", "seed"), ("strategy=random", "strategy"), ("reward.noise=0", "reward")):
        settings = [*SYNTHETIC, "random_baseline=false", change]
        with pytest.raises(ConfigError, match=f"another search: its {word}"):
            searching.search(compose(*settings, config_name="search"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=0"], "budget=0"),
        (["reward=classifier"], "data=<a data set>"),
        (["reward=classifier", "data=scenes"], "no label"),
        (["reward=detector", "data=digits"], "no boxes"),
        (["reward=classifier", "data=digits", "reward.train_size=1400"], "at most 1437"),
        (["reward=classifier", "data=digits", "reward.scale=0"], "scale=0"),
        (["strategy=grid"], "The grid has"),
        (["randaugment=true"], "synthetic reward"),
        (["storage=s.journal"], "strategy=tpe and random"),
        (["storage=s.journal", "strategy=tpe", "workers=2"], "worker=true"),
        (["storage=sqlite:////nowhere/s.db", "strategy=tpe"], "cannot be opened"),
        (["worker=true"], "needs storage="),
        (
            ["reward=classifier", "data=digits", "+compare.mine={_target_: torch.nn.Identity}"],
            "compare.mine is no augmentation",
        ),
        (["+compare.mine={_target_: lit_gen.augment.AugMix}"], "of its space only"),
        (["reward=classifier", "data=digits", "reward.child.consistency=-1"], "consistency=-1"),
        (["seeds=2", "test_children=0"], "test_children must"),
        (["space=randaugment", "strategy=tpe"], "space of policies"),
        (["reward=generative", "space=small", "data=digits"], "space=conditional"),
        (["reward=classifier", "space=conditional", "data=digits"], "space=conditional"),
        (["reward=generative", "space=conditional"], "data=<a data set>"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_child(compose, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        searching.search(compose(*overrides, "wandb=disabled", config_name="search"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_children_see_disjoint_images(compose):
    """Training and validation images are different ones of the training split, test images of the other."""
    data = instantiate(compose("data=digits", config_name="search").data)
    space = instantiate(compose("space=small", config_name="search").space)
    task = classifier(space, data, 0, train_size=700, validation_size=700, scale=2)
    reward = task.rewards[0]
    known = {image[:, ::2, ::2].numpy().tobytes() for image in reward.train.images}
    others = {image[:, ::2, ::2].numpy().tobytes() for image in reward.validation.images}
    assert len(known | others) == len(
        {
            x.numpy().tobytes()
            for x in torch.cat(
                [reward.train.images[:, :, ::2, ::2], reward.validation.images[:, :, ::2, ::2]]
            )
        }
    )
    whole = {image.numpy().tobytes() for image in digits("train").images}
    assert known <= whole and others <= whole and not known & others
    assert reward.train.images.shape[-2:] == (16, 16)


@pytest.mark.parametrize("strategy", ["tpe", "grid", "random"])
def test_strategies_with_children(compose, tmp_path, strategy):
    space = "randaugment" if strategy == "grid" else "small"
    common = ["wandb=disabled", f"strategy={strategy}", f"space={space}", "data=digits", *CHILD]
    if strategy == "grid":
        common += ["space.num_ops=[1]", "space.magnitudes=[3,9]"]
    report = searching.search(
        compose(*common, "reward=classifier", "budget=2", config_name="search"), tmp_path
    )
    rows = report["results"]
    assert rows["found"]["images"] == 2 * 60 and rows["none"].keys() == {"test", "test_scores"}
    assert ("best of random" in rows) == (strategy != "random")
    assert (tmp_path / "policy.yaml").exists() == (strategy != "grid")
    assert (tmp_path / "sheet.png").exists() and (tmp_path / "curve.png").exists()


def test_density_matching_merges_its_folds(compose, tmp_path):
    common = ["wandb=disabled", "strategy=tpe", "space=small", "data=digits", *CHILD, "random_baseline=false"]
    cfg = compose(*common, "reward=density", "reward.folds=2", "budget=3", "top=2", config_name="search")
    report = searching.search(cfg, tmp_path)
    assert len(Policy.load(tmp_path / "policy.yaml").sub_policies) == 2 * 2 * 2
    assert report["results"]["found"]["child_models"] == 6
    assert trials(tmp_path, "ledger_0") != trials(tmp_path, "ledger_1")


def test_a_detector_reward_is_reproducible_and_sees_boxes_move(compose):
    data = instantiate(compose("data=scenes", "data.train.size=24", config_name="search").data)
    small = {"steps": 4, "batch_size": 2, "width": 16}
    task = detector(None, data, 0, train_size=12, validation_size=6, test_size=2, child=small)
    reward = task.rewards[0]
    seen = []

    class Watching(Policy):
        def apply_batch(self, images, boxes, draws, masks=None, box_format=None):
            out = super().apply_batch(images, boxes, draws, masks, box_format)
            seen.append((boxes, out[1]))
            return out

    policy = Watching([[["TranslateX_BBox", 1.0, 2]]])
    a, b = (reward.child(policy, 0).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(seen) == 8 and not torch.equal(seen[0][0][0], seen[0][1][0])
    assert 0 <= reward(None) <= 1 and reward.images == 8


def test_stratified_split():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2)
    first, second = stratified_split(labels, 0.4, keyed_generator(0))
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(17))
    assert torch.bincount(labels[second]).tolist() == [4, 2, 1]
    with pytest.raises(ConfigError, match="Class 1 has 1 image"):
        stratified_split(torch.tensor([0, 0, 1]), 0.5, keyed_generator(0))


def test_density_matching_prefers_what_the_net_recognizes(compose):
    """Of a space of one harmless and one destructive op, density matching finds the harmless one."""
    data = digits("train")
    images = data.images[:500].repeat_interleave(2, 2).repeat_interleave(2, 3)
    space = instantiate(
        compose(
            "space=small",
            "space.ops=[Brightness,Invert]",
            "space.probabilities=[1.0]",
            "space.levels=[2]",
            config_name="search",
        ).space
    )
    rewards = density_folds(Labelled(images, data.labels[:500]), 10, folds=2, epochs=6, width=8)
    policy = merge([run(space, reward, TPE(space, 0), 6).best for reward in rewards])
    assert len(rewards) == 2 and len(policy.sub_policies) == 4
    assert {op[0] for sub in policy.sub_policies for op in sub} == {"Brightness"}


def logged(folder):
    """Name -> its values, of an offline W&B run."""
    file = next(folder.glob("wandb/offline-run-*/*.wandb"))
    tool = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    out = subprocess.run(tool, capture_output=True, text=True, timeout=1800).stdout
    names: dict[str, list] = {}
    for line in out.splitlines():
        record = json.loads(line) if line.startswith("{") else {}
        for key, value in record.get("history", {}).get("item", {}).items():
            names.setdefault(key, []).append(value)
    return names


def test_curves_go_to_wandb(compose, tmp_path):
    """Read back from an offline run: the rewards of the trial log, child by child, the shares of each op, the
    controls, the cost, the pictures, the test scores."""
    given = [*SYNTHETIC, "budget=6", "+space.ops=[Equalize,Color,Cutout]", "wandb=offline"]
    report = searching.search(compose(*given, config_name="search"), tmp_path)
    names = logged(tmp_path)
    for ledger, prefix in (("ledger", "search"), ("random", "random")):
        assert names[f"{prefix}/reward"] == pytest.approx([r for _, _, r in trials(tmp_path, ledger)])
        shares = [names[f"{prefix}/ops/{op}"] for op in ("Equalize", "Color", "Cutout")]
        chosen = [[c[0::3].count(k) for k in range(3)] for _, c, _ in trials(tmp_path, ledger)]
        assert [s[-1] for s in shares] == pytest.approx([sum(c) / (6 * 4) for c in zip(*chosen, strict=True)])
        assert names[f"{prefix}/best"] == sorted(names[f"{prefix}/best"])
        assert {f"{prefix}/{k}" for k in ("mean_of_50", "cpu_seconds", "images")} <= names.keys()
    assert names["trainer/global_step"][:6] == [1, 2, 3, 4, 5, 6]
    assert names["test/found"] == [pytest.approx(report["results"]["found"]["test"])]
    table = (Path(__file__).parents[2] / "docs" / "augment.md").read_text().split("| logged, to W&B |")[1]
    rows = [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in table.split("\n\n")[0].splitlines()[2:]]
    known = [re.sub("<[^>]+>", ".+", name) for row in rows for name in row]
    details = r"\.(?:_type|format|count|filenames|captions|width|height).*"  # of a picture
    mine = {re.sub(details, "", n) for n in names if n[0] != "_"}
    assert len(known) > 8 and any(name.startswith("search/curve") for name in mine)
    assert not [n for n in mine - {"trainer/global_step"} if not any(re.fullmatch(k, n) for k in known)]


@pytest.mark.slow
def test_two_commands_share_a_search(tmp_path):
    """The second trains children for the first and writes nothing; together they make the sequence of one
    alone, for uniform choices depend on a trial's number only."""
    common = [sys.executable, "-m", "lit_gen", "search", "reward=classifier", "data=digits", "space=small"]
    common += ["strategy=random", "budget=12", "test_children=0", "wandb=disabled", "reward.child.epochs=8"]
    storage = f"storage={tmp_path}/study.journal"
    first = subprocess.Popen(
        [*common, storage, f"out={tmp_path}/together"], stdout=subprocess.PIPE, text=True
    )
    joined = [*common, storage, "worker=true", f"out={tmp_path}/helper"]
    second = subprocess.run(joined, capture_output=True, text=True, timeout=1800)
    assert first.wait(timeout=1800) == 0 and second.returncode == 0, second.stderr
    assert "every child model is trained" in second.stdout and not (tmp_path / "helper").exists()
    subprocess.run([*common, f"storage={tmp_path}/alone.journal", f"out={tmp_path}/alone"], check=True)
    assert sorted(trials(tmp_path / "together")) == trials(tmp_path / "alone")


@pytest.mark.slow
def test_kill_and_restart_from_the_command_line(tmp_path):
    """SIGKILL in the middle, the same command again: the trial logs of an undisturbed search with workers."""
    common = ["reward=classifier", "data=digits", "space=small", "strategy.batch=4", "budget=16"]
    common += ["test_children=0", "reward.child.epochs=8", "wandb=disabled"]
    command = [sys.executable, "-m", "lit_gen", "search", *common]
    subprocess.run([*command, f"out={tmp_path}/whole", "workers=2"], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, f"out={tmp_path}/killed"], stdout=subprocess.DEVNULL, start_new_session=True
    )
    ledger = tmp_path / "killed" / "ledger.jsonl"
    while not ledger.exists() or len(ledger.read_text().splitlines()) < 6:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(trials(tmp_path / "killed")) < 16
    subprocess.run([*command, f"out={tmp_path}/killed"], check=True, capture_output=True)
    for name in ("ledger", "random"):
        assert trials(tmp_path / "killed", name) == trials(tmp_path / "whole", name)
