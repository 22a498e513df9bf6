"""The compiled kernels, built where there is a C compiler (GCC 12 or Clang); everything works without them."""

from pathlib import Path

from setuptools import Extension, setup

FOLDER = "src/fedkeel/kernels/c"

setup(
    ext_modules=[
        Extension(
            "fedkeel.kernels._native",
            sources=[f"{FOLDER}/native.c"],
            depends=[str(path) for path in sorted(Path(FOLDER).glob("*.[ch]"))],
            extra_compile_args=["-std=gnu11", "-O3", "-fno-math-errno", "-fvisibility=hidden"],
            libraries=["m"],
            optional=True,
        )
    ]
)
