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

/// The start of a guest that is a process: reads its supervisor from stdin.
pub(crate) const LOADER: &str = include_str!("../../guest/loader.py");
/// What the loader reads.
pub(crate) const SUPERVISOR: &str = include_str!("../../guest/supervisor.py");

/// The agent's modules for a process, which has threads of its own, in the order of their
/// installation.
pub(crate) fn process_sources() -> Vec<(&'static str, &'static str)> {
    const SHIMS: &[&str] = &["pools", "locks", "threads", "loop"];
    let agent = agent_sources().into_iter().filter(|(name, _)| !SHIMS.contains(name));
    let mut sources: Vec<_> = agent.collect();
    let end = sources.len() - 1;
    let own = [
        ("processes", include_str!("../../guest/processes.py")),
        ("saving", include_str!("../../guest/saving.py")),
        ("door", include_str!("../../guest/door.py")),
        ("worker", include_str!("../../guest/worker.py")),
    ];
    sources.splice(end..end, own);
    sources
}
