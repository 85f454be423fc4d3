"""How many numbers a vector register of this processor holds."""

import os

from baby_xp_backends import numba_library


def width_for(features: str) -> int:
    """Lanes of a vector register with these features of a CPU, as LLVM names them: "+avx2,-avx512f,..."."""
    known = features.split(",")
    return 16 if "+avx512f" in known else 8 if "+avx2" in known and "+fma" in known else 4


def features() -> str:
    """The features of the CPU that kernels are compiled for; numba's variables may name another than this one."""
    named = os.environ.get("NUMBA_CPU_FEATURES")
    if named is not None or os.environ.get("NUMBA_CPU_NAME"):
        return named or ""
    import llvmlite.binding

    return str(llvmlite.binding.get_host_cpu_features().flatten())


W = numba_library.library().width if numba_library.is_loaded() else width_for(features())
"""Lanes of a vector register of this processor. Loaded kernels know it, so that LLVM need not be loaded."""
