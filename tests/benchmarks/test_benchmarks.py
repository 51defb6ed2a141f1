"""The benchmarks run, at sizes where their figures mean nothing."""

import importlib
import json

import pytest
import torch
from cases.paths import BENCHMARKS

pytest.importorskip("yaml")

TINY = ["--batch=4", "--inputs=20", "--hidden=8", "--repeats=1", "--threads=1"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "extra", "expected"),
    [
        ("settling", ["--train-steps=3", "--euler-steps=2"], ["backprop", "DFC-SS, trained", "autoencoder: DFC-SSA"]),
        ("feedback", ["--draws=2"], ["Sampled, 47 steps", "simulated", "Expected", "cosine"]),
        ("feedback_passes", ["--train-steps=2", "--batches=2", "--passes=1"], ["Sampled", "Expected", "condition 2"]),
        (
            "scaling",
            ["--max-batch=32", "--max-width=64", "--max-depth=2", "--max-outputs=2"],
            ["batch size", "outputs n_L"],
        ),
        ("strong_dfc", ["--steps=3"], ["two phases, steady state", "single phase, 3 steps, as any network"]),
        ("memory", ["--train-steps=3", "--euler-steps=2"], ["DFC, 2 steps", "feedback, Expected"]),
    ],
)
def test_a_benchmark_prints_its_table_and_writes_its_figures(benchmark, tmp_path, capsys, name, extra, expected):
    benchmark(name).main([*TINY, f"--out={tmp_path}", *extra])
    printed = capsys.readouterr().out
    assert all(text in printed for text in expected)
    assert {"cpu", "torch", "date"} <= set(json.loads((tmp_path / f"{name}.json").read_text())["machine"])


@pytest.mark.slow
def test_the_benchmark_of_convolutional_networks_likewise(benchmark, tmp_path, capsys):
    sizes = ["--batch=4", "--train-steps=1", "--repeats=1", "--threads=1"]
    benchmark("convolutional").main([*sizes, f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("LeNet: DFC-SS, rtol 1e-5", "ResNet-8: DFC-SSA", "feedback, Sampled"))
    assert len(json.loads((tmp_path / "convolutional.json").read_text())["updates"]) == 18


@pytest.mark.slow
def test_the_benchmark_of_gpus_says_that_it_has_seen_none(benchmark, tmp_path, capsys):
    benchmark("gpu").main(["--quick", "--device=cpu", f"--out={tmp_path}"])
    entries = json.loads((tmp_path / "gpu.json").read_text())["entries"]
    assert len(entries) == 15 and not any("error" in e for e in entries)
    benchmark("gpu_page").main([str(tmp_path / "gpu.json"), f"--out={tmp_path / 'page.md'}"])
    written = (tmp_path / "page.md").read_text()
    assert written.startswith("Nothing of this was measured on a GPU") and "| Kolen-Pollack" in written


def test_the_autoencoders_update_signals_are_those_of_their_formulas(benchmark):
    script, g = benchmark("autoencoder"), torch.Generator().manual_seed(0)
    w = [torch.randn(n, m, generator=g, dtype=torch.float64) / m**0.5 for n, m in ((6, 9), (3, 6), (5, 3), (9, 5))]
    x, delta = (torch.randn(4, 9, generator=g, dtype=torch.float64) for _ in range(2))

    def output(kicks: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d = kicks.split([6, 3, 5, 9])
        return w[3] @ torch.tanh(w[2] @ (w[1] @ torch.tanh(w[0] @ x + a) + b) + c) + d

    kicks = torch.zeros(23, dtype=torch.float64)
    jacobians = torch.stack([torch.func.jacrev(output)(kicks, each) for each in x])
    first = torch.tanh(x @ w[0].T)
    slopes = [1 - first**2, 1 - torch.tanh(first @ w[1].T @ w[2].T) ** 2]

    def signals(rule):
        return torch.cat(rule(w, slopes, delta), dim=1)

    for damping in (0.0, 3.0):
        damped = jacobians @ jacobians.mT + damping * torch.eye(9, dtype=torch.float64)
        closed = (1 + damping) * (jacobians.mT @ torch.linalg.solve(damped, delta.unsqueeze(2))).squeeze(2)
        torch.testing.assert_close(signals(script.minimum_norm(damping)), closed, rtol=1e-9, atol=1e-9)
    exact = (jacobians.mT @ delta.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(signals(script.backprop), exact, rtol=1e-9, atol=1e-9)
    alike = [s.mean(0, keepdim=True).expand_as(s) for s in slopes]  # without spread shared feedback is backprop
    torch.testing.assert_close(
        torch.cat(script.shared(w, alike, delta), 1), torch.cat(script.backprop(w, alike, delta), 1)
    )


def test_peak_memory_on_the_cpu_is_that_of_the_tensors_held_at_a_time(benchmark):
    def call():
        a, b = (torch.empty(n * 2**20, dtype=torch.uint8) for n in (10, 5))
        del a
        c = torch.empty(7 * 2**20, dtype=torch.uint8)
        return b, c

    assert benchmark("memory").peak_bytes(call, "cpu") == 15 * 2**20


def test_the_ratio_pairs_the_rounds_that_both_methods_took_part_in(benchmark):
    ratio = benchmark("harness").ratio({"slow": [2.0, 6.0], "base": [1.0, 2.0, 100.0]}, "slow", "base")
    assert ratio == 2.5


def test_a_folder_without_the_authors_code_is_refused(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="--reference .*: no checkout of"):
        benchmark("reference").network_class(tmp_path)
