"""The native kernels, an optional part: without a C compiler the package installs and torch's operators serve."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class PlainLibrary(build_ext):
    """A shared library of C functions, not a Python module: it has no PyInit function to export."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


setup(
    ext_modules=[
        Extension(
            "layers.kernels._native",
            ["layers/kernels/native.c"],
            depends=sorted(map(str, Path("layers/kernels").glob("*.h"))),
            extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": PlainLibrary},
)
