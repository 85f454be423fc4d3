"""The sketches in PyTorch begin as the preset's twin and train through the command."""

import json

import pytest
from bench_cases import answering

from baby_xp import presets
from bench import sketches


def test_a_sketch_begins_as_the_twin_and_all_its_parts_learn():
    torch = pytest.importorskip("torch")
    from bench.peers.torch_modern import ModernGPT
    from bench.peers.torch_sketches import Sketch

    config = presets.preset("shakespeare").override({"n_ctx": 8, "n_emb": 8, "head_size": 8, "smear": False}).model
    ids = torch.randint(5, (2, 8))
    twin = ModernGPT(config, 5).float()
    sketch = Sketch(config, 5, sketches.SKETCHES["all three"]).float()
    sketch.load_state_dict(twin.state_dict())
    assert torch.allclose(sketch(ids, ids), twin(ids, ids), atol=1e-6)
    with torch.no_grad():
        sketch.smear.scale.fill_(0.1)  # otherwise the gate cannot learn yet
        # no part looks ahead: another last token changes no loss before it; -100 stands for no target
        other, targets = ids.clone(), ids.clone()
        other[:, -1], targets[:, -1] = (ids[:, -1] + 1) % 5, -100
        assert torch.allclose(sketch(ids, targets), sketch(other, targets))
    sketch(ids, ids).backward()
    of_twin = twin.state_dict()
    own = {name: p.grad.abs().max().item() for name, p in sketch.named_parameters() if name not in of_twin}
    values = {f"values.{i}.weight" for i in range(config.n_layers)}
    assert own.keys() == {"mix", "smear.scale", "smear.gate.weight", *values}
    assert min(own.values()) > 0


def test_the_command_keeps_each_loss_and_is_continued(monkeypatch, capsys, tmp_path):
    asked = []

    def answer(task, name="", seed=0):
        assert task == "bench.sketches:trained"
        asked.append((name, seed))
        return {"name": name, "seed": seed, "failed": None, "val_loss": 2.0 + seed}

    answering(monkeypatch, answer)
    file = tmp_path / "sketches.json"
    for seeds in ("1", "3"):
        if file.exists():  # as if it had been written before there was smear
            kept = json.loads(file.read_text())
            del kept["base"]["preset"]["model"]["smear"]
            file.write_text(json.dumps(kept))
        monkeypatch.setattr("sys.argv", ["bench.sketches", f"--file={file}", f"--seeds={seeds}"])
        assert sketches.main() == 0
    assert sorted(asked) == sorted((name, seed) for name in sketches.SKETCHES for seed in range(3))
    assert "3.000 (2.000, 3.000, 4.000)" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["trained"]) == len(asked)
