"""Gathers what scores need while the network trains."""

from lightning_slim.recording.inputs import InputRecorder
from lightning_slim.recording.recorder import Effect, Recorder

__all__ = ["Effect", "InputRecorder", "Recorder"]
