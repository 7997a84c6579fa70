"""`lit-gen export format=safetensors`: the folder is the model to the bit, and its card says what it is."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import create_autospec

import pytest
import torch
import yaml
from official import score_sde_state
from omegaconf import OmegaConf

import lit_gen
from lit_gen import models, runs
from lit_gen.commands import export, sample
from lit_gen.errors import ConfigError
from lit_gen.score.networks import DDPM

try:
    from huggingface_hub import HfApi as REAL
except ImportError:
    REAL = None

RUN = Path(__file__).parents[1] / "fixtures" / "run_2026_11"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with everything that a card shows."""
    folder = Path(shutil.copytree(RUN, tmp_path / "run"))
    (folder / "grids").mkdir()
    for step in (2, 4):
        (folder / "grids" / f"samples_{step:07d}.png").write_bytes(bytes([step]))
    runs.write_json(folder / "environment.json", {"commit": "0123abc+", "versions": {"torch": "2.0"}})
    return folder


def front_matter(folder: Path) -> tuple[dict, str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_folder_is_the_model_to_the_bit(run, command, tmp_path):
    code, said, err = command(export.main, f"run={run}", "checkpoint=last", "out=model")
    assert code == 0, err
    assert "README.md" in said
    shutil.rmtree(run)  # it stands alone
    exported, original = (
        lit_gen.load("model", device="cpu"),
        lit_gen.load(RUN, checkpoint="last", device="cpu"),
    )
    assert same_weights(exported.module, original.module)
    assert torch.equal(exported.sample(3, seed=5), original.sample(3, seed=5))
    assert exported.config.model.sampler.S_max == float("inf")
    code, _, err = command(sample.main, "run=model", "num=2", "out=samples", "device=cpu")
    assert code == 0 and (tmp_path / "samples" / "images" / "000001.png").is_file(), err
    code, _, err = command(export.main, "run=model", "out=again")  # of what was exported
    assert code == 0, err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


def test_an_exported_folder_holds_one_state(run, command, tmp_path):
    command(export.main, f"run={run}", "out=model")
    with pytest.raises(ConfigError, match="holds one state"):
        lit_gen.load(tmp_path / "model", checkpoint="step_1.ckpt")


def test_averaged_or_not(run, command, tmp_path):
    assert command(export.main, f"run={run}", "checkpoint=last", "out=raw", "ema=false")[0] == 0
    raw, _, _ = models.load(tmp_path / "raw", ema=False, device="cpu")
    assert same_weights(raw, models.load(RUN, "last", ema=False, device="cpu")[0])
    assert not same_weights(raw, models.load(RUN, "last", device="cpu")[0])
    assert command(export.main, f"run={run}", "checkpoint=last", "out=averaged")[0] == 0
    with pytest.raises(ConfigError, match="averaged weights alone"):
        models.load(tmp_path / "averaged", ema=False)


def test_the_card_tells_what_is_known(run, command, tmp_path):
    options = ("license=mit", "data_license='public domain'")
    assert command(export.main, f"run={run}", "checkpoint=last", "out=model", *options)[0] == 0
    metadata, text = front_matter(tmp_path / "model")
    assert metadata["library_name"] == "lit_gen" and metadata["license"] == "mit"
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["name"] == "digits"
    fd = {"type": "fd", "name": "fd_digits64_0184e91c_n32", "value": pytest.approx(1.86403)}
    assert fd in result["metrics"]
    assert len({file.stat().st_mode for file in (tmp_path / "model").iterdir()}) == 1  # others can read all
    for told in (
        "- steps: 4",
        "- seed: 0",
        "- commit: 0123abc+",
        "- data: digits",
        "| kd_digits64_0184e91c_n32 | 0.1009 ± 0.0081 | 32 |",
        "Measured in the training, after 4 steps.",
        "- training data: public domain",
        'model = lit_gen.load("model")',
    ):
        assert told in text, told
    assert (tmp_path / "model" / "grid.png").read_bytes() == bytes([4])
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert {r.metric_name for r in card.data.eval_results} >= {fd["name"]}


def test_the_card_prefers_an_evaluation_of_these_weights(run, command, tmp_path):
    entry = {"key": "fd_x_n9", "value": 2.5, "se": 0.25, "n_fake": 9}
    for name, file in (("a", "last.ckpt"), ("b", "best.ckpt")):
        (run / "evaluation" / name).mkdir(parents=True)
        record = {"checkpoint": f"runs/x/checkpoints/{file}", "seed": 7, "reference": "digits"}
        entry["key"] = f"fd_{name}_n9"
        runs.write_json(run / "evaluation" / name / "evaluation.json", record | {"results": [entry]})
    assert command(export.main, f"run={run}", "checkpoint=last", "out=model")[0] == 0
    text = front_matter(tmp_path / "model")[1]
    assert "| fd_a_n9 | 2.50 ± 0.25 | 9 |" in text and "fd_b" not in text and "digits64_0184" not in text
    os.utime(run / "evaluation" / "a" / "evaluation.json", (0, 0))  # of a checkpoint that this one replaced
    assert command(export.main, f"run={run}", "checkpoint=last", "out=later")[0] == 0
    assert "fd_a" not in front_matter(tmp_path / "later")[1]


def test_the_card_reads_an_evaluation_of_translations(run, command, tmp_path):
    (run / "evaluation" / "a").mkdir(parents=True)
    record = {"checkpoint": "last.ckpt", "weights": "average", "contents": 5, "target_classes": 3, "seed": 7}
    record["results"] = {"copying": {"l1": 0.5}, "K = 1": {"l1": 0.25}}
    runs.write_json(run / "evaluation" / "a" / "evaluation.json", record)
    assert command(export.main, f"run={run}", "checkpoint=last", "out=model")[0] == 0
    metadata, text = front_matter(tmp_path / "model")
    assert "| l1, K = 1 | 0.25 | 15 |" in text and "| l1, copying | 0.5 |  |" in text
    assert [m["name"] for m in metadata["model-index"][0]["results"][0]["metrics"]] == ["l1, K = 1"]
    assert command(export.main, f"run={run}", "checkpoint=last", "out=raw", "ema=false")[0] == 0
    assert "K = 1" not in front_matter(tmp_path / "raw")[1]  # which are other weights


def test_a_link_to_an_empty_folder(run, command, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    code, _, err = command(export.main, f"run={run}", "checkpoint=last", "out=model")
    assert code == 0, err
    assert (tmp_path / "disk" / "model.safetensors").is_file() and (tmp_path / "model").is_symlink()
    (tmp_path / "file").write_text("")
    code, _, err = command(export.main, f"run={run}", "checkpoint=last", "out=file/model")
    assert code == 2 and "cannot be made" in err


def test_nothing_of_this_machine_is_told(run, command, tmp_path):
    config = runs.saved_config(run)
    config.data.train.path, config.data.storage = "/home/me/photos", "s3://me:hunter2@host/x"
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    assert command(export.main, f"run={run}", "checkpoint=last", "out=model")[0] == 0
    for file in ("config.json", "README.md"):
        said = (tmp_path / "model" / file).read_text()
        assert "/home/me" not in said and "hunter2" not in said and "photos" in said
    assert "NaN" not in json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()))


@pytest.mark.parametrize(
    ("format", "files", "library"),
    [
        ("diffusers", {"model_index.json", "pipeline.py", "unet"}, "diffusers"),
        pytest.param("torch_export", {"denoiser.pt2", "config.json"}, "pytorch", marks=pytest.mark.slow),
    ],
)
def test_other_formats(format, files, library, command, tmp_path):
    options = (f"run={RUN}", "checkpoint=last", f"format={format}", "push=me/digits")
    with pytest.MonkeyPatch.context() as patch:
        fake_hub(patch)
        code, _, err = command(export.main, *options, "out=model")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "model").iterdir()} == files | {"README.md"}
    metadata, text = front_matter(tmp_path / "model")
    assert metadata["library_name"] == library
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "README.md", "exec")
    assert "me/digits" in code and ("snapshot_download" in code) == (library != "diffusers")


def test_official_weights(command, tmp_path):
    torch.manual_seed(0)
    net = DDPM(8, channels=1, base_channels=32, channel_mult=(1, 1), num_blocks=1, attention_resolutions=())
    torch.save({"model": score_sde_state(net), "step": 1}, tmp_path / "ddpm.pth")
    options = ("weights=ddpm.pth", "model=ddpm", "image_size=8")
    code, _, err = command(export.main, *options, "out=model")
    assert code == 0, err
    exported = lit_gen.load(tmp_path / "model", device="cpu")
    assert same_weights(exported.module.denoiser.net, net)
    official = lit_gen.load(tmp_path / "ddpm.pth", model="ddpm", image_size=8, device="cpu")
    assert torch.equal(exported.sample(2), official.sample(2))


class Refused(OSError):
    """What huggingface_hub raises where nobody is logged in."""


def fake_hub(monkeypatch, refuses: bool = False):
    """A hub in this process, with the signatures of the real one where that is installed."""
    calls = []

    class HfApi:
        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            if refuses:
                raise Refused("401 Client Error: log in")
            calls.append(("create", repo_id, private, exist_ok))
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message=None):
            calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))

    fake = api = HfApi()
    if REAL is not None:
        api = create_autospec(REAL, instance=True)
        api.create_repo.side_effect, api.upload_folder.side_effect = fake.create_repo, fake.upload_folder
    module = ModuleType("huggingface_hub")
    module.HfApi = lambda: api
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_push(run, command, tmp_path, monkeypatch):
    calls = fake_hub(monkeypatch)
    options = (f"run={run}", "checkpoint=last")
    code, said, err = command(export.main, *options, "out=model", "push=me/digits")
    assert code == 0, err
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert calls == [("create", "me/digits", True, True), ("upload", "me/digits", files)]
    assert "https://hub/me/digits" in said
    assert 'lit_gen.load(snapshot_download("me/digits"))' in front_matter(tmp_path / "model")[1]
    fake_hub(monkeypatch, refuses=True)
    code, _, err = command(export.main, *options, "out=other", "push=me/digits")
    assert code == 2 and "401" in err and "hf upload me/digits other" in err
    assert (tmp_path / "other" / "model.safetensors").is_file()


MISTAKES = {
    "out=model": "Give run=",
    "run=nowhere out=model": "nowhere",
    "out=full run={run}": "not empty",
    "out=model run={run} format=pickle": "safetensors",
    "out=model run={run} push=digits": "owner/name",
    "out=model run=damaged": "damaged",
}


@pytest.mark.parametrize(("mistake", "says"), MISTAKES.items(), ids=list(MISTAKES))
def test_mistakes(command, tmp_path, mistake, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"half")
    record = {"library_name": "lit_gen", "averaged": True, "step": 1, "run": {"model": {}}}
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(record))
    code, _, err = command(export.main, *mistake.format(run=RUN).split())
    assert code == 2 and says in err and "Traceback" not in err
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".*"))


def test_a_hub_that_is_not_installed(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = command(export.main, f"run={RUN}", "out=model", "push=me/digits")
    assert code == 2 and "lit-gen[hub]" in err
