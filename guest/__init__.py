"""Kaa's guest agent: runs cells of Python for the host, inside every backend."""

from .agent import install

__all__ = ["install"]
