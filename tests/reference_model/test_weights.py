"""The weights in the package: what they are, and that they know more than the pieces they begin with."""

import json
from dataclasses import asdict

import pytest
from vae_inputs import shapes

pytest.importorskip("safetensors")

from reference_model.dataset import collate_volumes  # noqa: E402
from reference_model.vae_decode import DEFAULT_WEIGHTS, load_vae, read_card  # noqa: E402
from reference_model.vae_encode import encode_volume  # noqa: E402
from reference_model.vae_fit import closeness, fit_cells  # noqa: E402
from reference_model.vae_loss import make_targets  # noqa: E402
from reference_model.vae_pieces import piece_values  # noqa: E402


def test_card():
    card = read_card(DEFAULT_WEIGHTS)
    assert DEFAULT_WEIGHTS.stat().st_size <= 8_000_000
    assert card["format"] == "ssa-vae" and len(card["commit"]) >= 7 and len(card["data_hash"]) == 64 and float(card["hours"]) > 0
    assert len(json.loads(card["held_out"])) == 5 and not set(json.loads(card["held_out"])) & {"skull", "dragon_gen_000"}
    assert asdict(load_vae(DEFAULT_WEIGHTS).config)["head"] == "pieces"


def test_reconstruction():
    """A ball, a block with edges and a torus of a few cells: all nearer than pieces alone, what is round by a tenth and more."""
    model = load_vae(DEFAULT_WEIGHTS)
    for volume, most in zip(shapes(), (0.85, 0.97, 0.9), strict=True):
        batch = collate_volumes([volume])
        targets = make_targets(batch)
        decoded = model.decode(encode_volume(model, batch), batch.latents, batch.resolution)
        pieces = piece_values(fit_cells(targets, batch.resolution, model.config.planes), batch.resolution).clamp(-1, 1)
        ours, alone = (closeness(x, targets, batch.resolution).mean() for x in (decoded, pieces))
        assert ours < most * alone
