"""Registered releases as loaded pipelines in this process. Signatures first."""

from millrace.applications import Application
from millrace.releases.pipeline import AnswerPipeline
from millrace.settings import Settings


class ReleaseLoader:
    """Loads an application's releases; releases with the same weights share one engine. Thread-safe."""

    def __init__(self, settings: Settings, application: Application) -> None:
        self.settings = settings
        self.application = application

    def load(self, version: str) -> AnswerPipeline:
        """The pipeline of `version`; loaded once, kept until `unload`."""
        raise NotImplementedError

    def unload(self, version: str) -> None:
        """Forget `version`; frees its engine when no other loaded release uses it."""
        raise NotImplementedError

    def close(self) -> None:
        """Unload everything."""
        raise NotImplementedError
