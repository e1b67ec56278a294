"""The weights in the package: what they are, and that they know more than the pieces they begin with."""

import json
from dataclasses import asdict

import pytest
import torch
from vae_inputs import shapes

pytest.importorskip("safetensors")

from reference_model.dataset import collate_volumes  # noqa: E402
from reference_model.vae_decode import DEFAULT_WEIGHTS, load_vae, read_card  # noqa: E402
from reference_model.vae_fit import fit_cells  # noqa: E402
from reference_model.vae_loss import make_targets, reconstruction_terms  # noqa: E402
from reference_model.vae_pieces import piece_values  # noqa: E402


def test_card():
    card = read_card(DEFAULT_WEIGHTS)
    assert DEFAULT_WEIGHTS.stat().st_size <= 8_000_000
    assert card["format"] == "ssa-vae" and len(card["commit"]) >= 7 and len(card["data_hash"]) == 64 and float(card["hours"]) > 0
    assert len(json.loads(card["held_out"])) == 5 and not set(json.loads(card["held_out"])) & {"skull", "dragon_gen_000"}
    assert asdict(load_vae(DEFAULT_WEIGHTS).config)["head"] == "pieces"


def test_reconstruction():
    """A ball, a block with edges and a torus of a few cells: a tenth fewer squares than pieces alone leave. Of the ball alone, which they
    hold almost exactly, more."""
    model = load_vae(DEFAULT_WEIGHTS)
    batch = collate_volumes(shapes())
    targets = make_targets(batch, focus=model.config.focus)
    with torch.no_grad():
        decoded = model.decode(model.encode(batch).mean, batch.latents, batch.resolution)
    ours = reconstruction_terms(decoded, targets)
    alone = reconstruction_terms(piece_values(fit_cells(targets, batch.resolution, model.config.planes), batch.resolution), targets)
    for name in ("in", "ext", "sharp"):
        assert ours[name] < 0.92 * alone[name]
