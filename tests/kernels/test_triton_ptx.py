"""What Triton compiles for GPUs, run without one: a few cases; ``make test-ptx`` runs them all.

The interpreter, which runs the others, sees neither inline assembly nor bfloat16 products, nor how threads race.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
REFINED = "{'key_bits': 3, 'page_size': 64, 'q_per_kv': 4, 'key_dim': 144}"
CASES = (
    f"test_triton_keys.py::test_scores_are_those_of_float64_but_for_rounding[ptx-{REFINED}]",
    "test_decode_attention.py::test_is_the_attention_of_the_reference"
    "[(2, 4, 32, 4, 96, 128, 128, torch.float16)-ptx-0.95]",
    "test_codec.py::test_any_strides_give_the_same_pages[ptx]",
    "test_top_p.py::test_flags_are_the_union_over_the_query_heads[ptx-one-0.95]",
    "test_top_p.py::test_rows_of_any_length_keep_nearly_all[ptx-16451]",
    "test_prefill.py::test_attend_stripes_is_as_close_to_float64_as_the_definition[ptx-shape1]",
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "0", reason="every case is run so here")
def test_compiled_kernels_are_right_on_the_emulated_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", *(f"{FOLDER / case}" for case in CASES)],
        env=os.environ | {"TRITON_INTERPRET": "0", "HF_TWILIGHT_BACKEND": ""}, cwd=FOLDER.parents[1], check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert f"{len(CASES)} passed" in done.stdout, done.stdout + done.stderr
