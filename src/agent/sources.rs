//! The guest agent itself, as it is installed into a guest.

/// The source line of one turn of an installed agent.
pub(crate) const TURN: &str = "__kaa_turn__()";
/// The script that installs the agent into a guest that has none.
pub(crate) const BOOTSTRAP: &str = include_str!("../../guest/bootstrap.py");

/// The agent's modules in the order of their installation.
pub(crate) fn agent_sources() -> [(&'static str, &'static str); 15] {
    macro_rules! sources {
        ($($name:literal),+ $(,)?) => {
            [$(($name, include_str!(concat!("../../guest/", $name, ".py")))),+]
        };
    }
    sources![
        "values",
        "streams",
        "imports",
        "calls",
        "cells",
        "namespace",
        "profiles",
        "repairs",
        "freeze",
        "pools",
        "locks",
        "threads",
        "loop",
        "agent",
        "__init__",
    ]
}
