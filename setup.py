"""Package metadata; installs without a compiler.

A compiled extension hooks in here and only here: pass `ext_modules` and `cmdclass` to `setup` when the sources under
kernels/ and a compiler are present, and leave both empty otherwise, so that a plain install never needs one.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-lance",
    version="0.1.0",
    description="A trainer for Lance-type dual-expert multimodal models on megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_lance", "megatron_lance.*"]),
    python_requires=">=3.11",
    install_requires=[
        "av>=15.0",
        "diffusers>=0.36",
        "einops>=0.8",
        "fsspec>=2024.6",
        "megatron-core>=0.16.1",
        "numpy>=2.0",
        "nvidia-dali-cuda130>=2.4",
        "pillow>=11.0",
        "psutil>=6.0",
        "pyarrow>=18.0",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "scipy>=1.14",
        "tensorboard>=2.18",
        "tokenizers>=0.22",
        "torch>=2.11",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "ruff>=0.11",
            "types-PyYAML>=6.0",
        ],
        "te": ["transformer-engine[pytorch]>=2.9"],
    },
)
