"""Training the VAE from the command line: configurations, data, resumption, weights."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from reference_model.checkpoint import list_checkpoints, read_header
from reference_model.cli import parse
from reference_model.dataset import PreparedVolume
from reference_model.train_settings import TrainSettings
from reference_model.train_vae import build_model, load_data, main, split_prepared
from reference_model.vae import SparseVAE, VAEConfig
from reference_model.vae_decode import load_vae, read_card

TINY = ["train=cpu-tiny", "workers=0", "picture=false", "validation=1", "shapes.families=tray+bracket", "shapes.count=1"]


def configuration(*overrides: str) -> dict:
    config, _ = parse("train_vae", ("out",), list(overrides))
    return OmegaConf.to_container(config, resolve=True)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def curve(out: Path) -> list[dict]:
    return [{name: row[name] for name in ("step", "kind", "in", "ext", "sharp", "kl", "total")} for row in rows(out)]


@pytest.mark.parametrize("name", ["cpu-tiny", "gpu-256", "gpu-512", "gpu-1024", "gpu-multi"])
def test_every_configuration_is_whole(name: str) -> None:
    for size in ("full", "compact"):
        config = configuration(f"train={name}", f"vae={size}", "data=mixed")
        settings = TrainSettings(**config["trainer"] | {"betas": tuple(config["trainer"]["betas"])})
        assert settings.steps > 0 and config["weights"] == {"prepared": 0.5, "shapes": 0.5}
        assert config["vae"]["hidden_size"] == {"full": 512, "compact": 128}[size]
        assert config["resolutions"] and set(config["held_out"]) >= {"sword", "featuretype", "bracket_73416", "spot", "stanford-bunny"}


def test_help_lists_the_chosen_groups_too(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0
    for setting in ("schedule_minutes:", "# vae=full", "ext_target:", "# train=cpu-tiny", "max_tokens:", "# data=shapes", "weights:"):
        assert setting in told


def test_compact_weights_stay_below_8_mb() -> None:
    with torch.device("meta"):
        model = SparseVAE(VAEConfig(**configuration("vae=compact")["vae"]))
    assert 2 * sum(p.numel() for p in model.parameters()) < 7.95e6


def test_compile_takes_what_only_moves_bytes() -> None:
    """Only marked here: the first call compiles."""
    model = build_model(configuration("train=gpu-256", "vae=tiny"), {}, torch.device("cpu"))
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    norms = [f"decoder.up.{i}.norm{j}" for i in range(3) for j in (1, 2)]
    assert compiled == ["encoder.lift.rows", *norms, "decoder.head", "decoder.patch"]


def test_held_out_meshes_and_their_copies_are_not_trained_on() -> None:
    def volume(name: str, geometry: str, split: str = "train") -> PreparedVolume:
        return PreparedVolume(Path(name), name, geometry, split, 256, 1, 1)

    given = [volume("spot", "a", "val"), volume("cow", "a"), volume("b", "b"), volume("c", "c", "val"), volume("d", "d", "test")]
    train, held = split_prepared(given, ["spot", "sword"])
    assert [v.name for v in train] == ["b"] and [v.name for v in held] == ["spot", "cow"]
    train, held = split_prepared(given[2:], ["spot"])
    assert [v.name for v in train] == ["b"] and [v.name for v in held] == ["c"]


def test_patches_are_trained_on(tmp_path) -> None:
    out = tmp_path / "run"
    arguments = ["patch_latents=8", "resolutions=[128]", "tokens=100", "trainer.steps=4", "trainer.log_every=1", "trainer.validate_every=4"]
    assert main([f"out={out}", *TINY, *arguments]) == 0
    train = [row for row in rows(out) if row["kind"] == "train"]
    assert len(train) == 4 and all(row["samples/s"] > 0 and row["skipped"] == 0 for row in train)
    assert json.loads(read_card(out / "weights.safetensors")["training"])["patch_latents"] == 8


def test_one_shape_is_learned_and_its_weights_load(tmp_path) -> None:
    out = tmp_path / "run"
    tiny = [*TINY, "vae.head=clamp", "overfit=1"]
    arguments = ["trainer.steps=20", "trainer.lr=4e-3", "trainer.schedule=constant", "picture=true"]
    assert main([f"out={out}", *tiny, *arguments]) == 0
    train = [row for row in rows(out) if row["kind"] == "train"]
    assert train[-1]["total"] < 0.6 * train[0]["total"]
    assert len({round(row["tokens/s"] * row["seconds_a_step"]) for row in train}) == 1  # the same volume again and again
    assert [row["step"] for row in rows(out) if row["kind"] == "validation"] == [0, 10, 20]
    assert list((out / "pictures").glob("*.png"))
    card = read_card(out / "weights.safetensors")
    assert json.loads(card["training"])["overfit"] == 1 and len(card["data_hash"]) == 64 and card["step"] == "20"
    model = load_vae(out / "weights.safetensors")
    (path,) = list_checkpoints(out / "checkpoints")[-1:]
    assert read_header(path)[1]["commit"] == card["commit"] and model.config.hidden_size == 32
    assert main([f"out={tmp_path / 'more'}", f"init={out / 'weights.safetensors'}", *tiny, "trainer.steps=1"]) == 0
    assert rows(tmp_path / "more")[1]["total"] < 1.5 * train[-1]["total"]


def test_crops_and_symmetries_reach_the_training(tmp_path, monkeypatch) -> None:
    asked, loss = [], SparseVAE.loss
    monkeypatch.setattr(SparseVAE, "loss", lambda self, *a, crop_latents: asked.append(crop_latents) or loss(self, *a, crop_latents))
    arguments = [*TINY, "trainer.steps=2", "trainer.validate_every=9", "crop_latents=3", "trainer.peak_tflops=1"]
    assert main([f"out={tmp_path}", *arguments]) == 0
    assert set(asked) == {3} and rows(tmp_path)[2]["mfu"] > 0
    turned, still = (load_data(configuration(*TINY, f"symmetries={given}"), {}).stream for given in ("true", "false"))
    assert len({turned[step].symmetries for step in range(4)}) > 1 and still[0].symmetries == ()


def test_two_ranks_killed_at_once_go_on_as_if_never_stopped(tmp_path, capsys) -> None:
    """SIGKILL in the middle of a run on two ranks, then torchrun: the curve and the weights of a run that was not stopped."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    arguments = [*TINY, "trainer.steps=8", "trainer.save_every=2", "trainer.log_every=1", f"cache={tmp_path / 'cache'}"]

    def train(out: Path) -> None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reference_model.train_vae"]
        done = subprocess.run([*launch, f"out={out}", *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(straight)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = dict(TORCHELASTIC_RUN_ID="test", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    command = [sys.executable, "-m", "reference_model.train_vae", f"out={killed}", *arguments]
    ranks = [
        subprocess.Popen(command, env={**environment, **group, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.DEVNULL)
        for rank in "01"
    ]
    try:
        end = time.monotonic() + 120
        while not ((killed / "log.jsonl").exists() and any(row["step"] > 2 for row in rows(killed))):
            assert all(process.poll() is None for process in ranks) and time.monotonic() < end
            time.sleep(0.01)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
        for process in ranks:
            process.wait()
    saved = [int(path.stem.split("_")[1]) for path in list_checkpoints(killed / "checkpoints")]
    assert saved and saved[-1] < 8 and not (killed / "weights.safetensors").exists()
    train(killed)
    assert curve(killed) == curve(straight) and [row["step"] for row in curve(killed) if row["kind"] == "train"] == [*range(1, 9)]
    assert json.loads(read_card(killed / "weights.safetensors")["ranks"]) == 2
    first, second = (load_file(out / "weights.safetensors") for out in (straight, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    averaged = load_file(list_checkpoints(killed / "checkpoints")[-1])
    assert all(torch.equal(x, averaged[f"ema/{name}"].bfloat16()) for name, x in first.items())
    assert any(not torch.equal(averaged[f"ema/{name}"], averaged[f"model/{name}"]) for name in first)
    assert main([f"out={killed}", *arguments, "trainer.lr=1"]) == 2
    assert "another config" in capsys.readouterr().err
    config = configuration(*arguments[:-1])
    streams = [load_data(config, {"cache": str(tmp_path / "cache")}, rank).stream for rank in range(2)]
    drawn = [[sum(stream[step].counts["tokens"] for stream in which) for step in range(8)] for which in (streams, streams[:1])]
    counted = [round(row["tokens/s"] * row["seconds_a_step"]) for row in rows(straight) if row["kind"] == "train"]
    assert counted == drawn[0] != [2 * tokens for tokens in drawn[1]]  # each rank draws its own


def test_shapes_and_prepared_volumes_mix(tmp_path, capsys) -> None:
    from reference_model.meshes import save_mesh
    from reference_model.prepare import main as prepare
    from reference_model.shapes import make_shape

    for name, seed in (("spot", 1), ("part", 2), ("large", 3)):
        shape = make_shape("tray", seed)
        save_mesh(tmp_path / f"{name}.ply", shape.vertices, shape.faces)
    settings = ["resolution=64", "contact_sheet=0", "val=0", "test=0"]
    assert prepare([f"meshes={tmp_path}", f"out={tmp_path / 'data' / '64'}", *settings]) == 0
    config = configuration(*TINY, "data=mixed", "tokens=2000", "symmetries=false")
    data = load_data(config, {"prepared": str(tmp_path / "data")})
    assert data.facts["train"] == 2 and data.facts["held_out"] == ["spot"]
    assert [batch.meta[0]["source"] for batch in data.validation] == ["spot.ply"]
    seen = {m["source"] for number in range(3) for m in data.stream[number].volumes.meta}
    assert seen <= {"part.ply", "large.ply", "tray_000000", "bracket_000000"} and len(seen) > 2
    tokens = sorted(v.tokens for v in data.stream.sources[0][0].volumes)
    limited = load_data({**config, "max_tokens": tokens[0]}, {"prepared": str(tmp_path / "data")})
    assert limited.facts["train"] == 1 and limited.facts["dropped"] == 1
    patches = load_data({**config, "patch_latents": 8}, {"prepared": str(tmp_path / "data")})
    assert patches.stream.patch_latents == 8 and data.stream.patch_latents is None
    small = load_data({**config, "patch_latents": 8, "max_tokens": tokens[0]}, {"prepared": str(tmp_path / "data")})
    assert small.facts["train"] == 2 and small.facts["dropped"] == 0  # only a patch counts against max_tokens
    with pytest.raises(ValueError, match="overfit trains on whole volumes: patch_latents must be null, got 8"):
        load_data({**config, "patch_latents": 8, "overfit": 1}, {"prepared": str(tmp_path / "data")})
    assert limited.stream.data_hash() != data.stream.data_hash() == replace(data.stream, seed=5).data_hash()
    with pytest.raises(ValueError, match="prepared= must be given"):
        load_data(config, {})
    with pytest.raises(ValueError, match=r"resolutions=\[48\] were not prepared, and .* has no margin .* or draw resolutions=\[64\]"):
        load_data({**config, "resolutions": [48, 64]}, {"prepared": str(tmp_path / "data")})
    paths = [f"prepared={tmp_path / 'data'}", f"fits={tmp_path / 'fits'}"]
    run = [f"out={tmp_path / 'run'}", *paths, *TINY, "data=prepared", "trainer.steps=2", "tokens=500", "patch_latents=8"]
    assert main(run) == 0 and len(list((tmp_path / "fits" / "planes").iterdir())) == 3 and len(curve(tmp_path / "run")) > 1
    assert main([*run, "vae.head=clamp"]) == 2 and main([*run, "data=shapes"]) == 2
    assert capsys.readouterr().err.count("fits= is of prepared volumes and of head") == 2
