"""What names CUDA and no rehearsal enters, with the reason: (file, text, outcome, None for a statement) -> why."""
from __future__ import annotations

EXCEPTIONS: dict[tuple[str, str, bool | None], str] = {
    ("compile/comfyui/machine_check.py", 'device.type == "cuda"', False): "ComfyUI computes on one device a process; "
        "tests/nodes/test_check.py runs this on the CPU",
    **{("int8/kernels/triton_gemm.py", 'device.type == "cuda"', outcome): "asked of tiles that read through TMA, which tests/int8 "
       "runs: in the interpreter, and on an H100" for outcome in (True, False)},
    ("compile/comfyui/trial.py", 'device.type == "cuda"', False): "as above; tests/nodes/test_calibrate.py",
}
