"""What pyproject.toml cannot say: the folder `configs/` is installed as `pera_jax/configs/`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["pera_jax*", "data_prep*"]), "pera_jax.configs"],
    package_dir={"pera_jax.configs": "configs"},
)
