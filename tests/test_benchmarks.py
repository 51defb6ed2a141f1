"""The benchmarks run, at sizes where their figures mean nothing."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("yaml")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = ["--batch=4", "--inputs=20", "--hidden=8", "--repeats=1", "--threads=1"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "extra", "expected"),
    [
        ("settling", ["--train-steps=3", "--euler-steps=2"], ["backprop", "DFC-SS, trained", "autoencoder: DFC-SSA"]),
        ("feedback", ["--draws=2"], ["Sampled, 47 steps", "Expected", "cosine"]),
        ("feedback_passes", ["--train-steps=2", "--batches=2", "--passes=1"], ["Sampled", "Expected", "condition 2"]),
        (
            "scaling",
            ["--max-batch=32", "--max-width=64", "--max-depth=2", "--max-outputs=2"],
            ["batch size", "outputs n_L"],
        ),
        ("memory", ["--train-steps=3", "--euler-steps=2"], ["DFC, 2 steps", "feedback, Expected"]),
    ],
)
def test_a_benchmark_prints_its_table_and_writes_its_figures(benchmark, tmp_path, capsys, name, extra, expected):
    benchmark(name).main([*TINY, f"--out={tmp_path}", *extra])
    printed = capsys.readouterr().out
    assert all(text in printed for text in expected)
    assert {"cpu", "torch", "date"} <= set(json.loads((tmp_path / f"{name}.json").read_text())["machine"])


def test_the_benchmark_of_convolutional_networks_likewise(benchmark, tmp_path, capsys):
    sizes = ["--batch=4", "--train-steps=1", "--repeats=1", "--threads=1"]
    benchmark("convolutional").main([*sizes, f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("LeNet: DFC-SS, rtol 1e-5", "ResNet-8: DFC-SSA", "feedback, Sampled"))
    assert len(json.loads((tmp_path / "convolutional.json").read_text())["updates"]) == 18


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
