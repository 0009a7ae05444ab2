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
    if RESERVED_NAMES.contains(&tool.name()) {
        // RLM's own sentence, so that its users recognize it.
        return Err(Error::invalid(
            "tools",
            format!(
                "Custom tools cannot override reserved REPL functions: ['{}']. \
                 Reserved names: {RESERVED_NAMES:?}",
                tool.name()
            ),
        ));
    }
    Ok(())
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
