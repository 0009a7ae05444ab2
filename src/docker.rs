//! Sessions in containers, over the API of a Docker engine.
