"""Where the project keeps its files."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
RECIPES = ROOT / "recipes"
BENCHMARKS = ROOT / "benchmarks"
