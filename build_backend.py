"""What pip calls to build fastcnn: setuptools', or a line that says what to install first."""

OLDEST = 77  # it reads pyproject.toml's license

try:
    import setuptools
    from setuptools.build_meta import *  # noqa: F403  the hooks that pip calls

    found = int(setuptools.__version__.split(".")[0])
except ImportError:
    found = 0
if found < OLDEST:
    there = f"setuptools {found} is here" if found else "no setuptools is here"
    raise SystemExit(
        f"fastcnn: {there}, {OLDEST} or later is needed; first: pip install 'setuptools>=77,<82' wheel ninja"
    )
