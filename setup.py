"""Maps the three import packages to their folders; all metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["mmscale", "mmscale.*"]),
        *find_packages("kernels"),
        *find_packages("launcher"),
    ],
    package_dir={
        "mmscale_kernels": "kernels/mmscale_kernels",
        "mmscale_launcher": "launcher/mmscale_launcher",
    },
)
