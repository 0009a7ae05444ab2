//! Which names variables and tools may have.

use crate::environment::Tool;
use crate::error::{Error, Result};

/// Names that belong to the profiles; neither variables nor tools may take them.
pub(crate) const RESERVED_NAMES: &[&str] = &[
    "FINAL",
    "FINAL_VAR",
    "SHOW_VARS",
    "answer",
    "context",
    "history",
    "llm_batch",
    "llm_query",
    "llm_query_batched",
    "rlm_query",
    "rlm_query_batched",
];

/// Whether a tool's name can be used.
///
/// # Errors
///
/// [`Error::Invalid`] when it is no identifier or reserved.
pub(crate) fn check_tool(tool: &Tool) -> Result<()> {
    check_name("tool", tool.name())?;
    check_reserved(std::iter::once(tool.name()))
}

/// Whether none of these names is reserved.
///
/// # Errors
///
/// [`Error::Invalid`] naming those that are, in RLM's own sentence, so that its users recognize it.
pub(crate) fn check_reserved<'a>(names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut conflicts: Vec<&str> = names.filter(|name| RESERVED_NAMES.contains(name)).collect();
    if conflicts.is_empty() {
        return Ok(());
    }
    conflicts.sort_unstable();
    let list = |names: &[&str]| format!("['{}']", names.join("', '"));
    let (conflicts, reserved) = (list(&conflicts), list(RESERVED_NAMES));
    let reason = format!(
        "Custom tools cannot override reserved REPL functions: {conflicts}. Reserved names: {reserved}"
    );
    Err(Error::invalid("tools", reason))
}

/// Whether `name` can be a Python variable. Identifiers beyond ASCII are left to the agent, which
/// asks Python itself.
///
/// # Errors
///
/// [`Error::Invalid`] naming `what` and the name.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let mut chars = name.chars();
    let starts = chars.next().is_some_and(|c| c.is_alphabetic() || c == '_');
    if starts && chars.all(|c| c.is_alphanumeric() || c == '_') && name.len() <= 1_000 {
        return Ok(());
    }
    Err(Error::invalid(
        format!("{what} name `{}`", name.escape_debug()),
        "it must be a Python identifier",
    ))
}
