//! The flags that say who answers language model calls.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use kaa::lm::{LmHandler, ScriptedHandler, SocketHandler};

use super::Failure;
use super::flags::reason;

/// Who answers language model calls.
#[derive(Debug, Args)]
pub(super) struct LmFlags {
    /// Address of an RLM LM handler that answers llm_query
    #[arg(
        long, value_name = "HOST:PORT", help_heading = "Reach",
        value_parser = socket, conflicts_with = "lm_script"
    )]
    lm: Option<SocketHandler>,
    /// File of rules that answer llm_query without any model; see examples/packages.lm.json
    #[arg(long, value_name = "FILE", help_heading = "Reach")]
    lm_script: Option<PathBuf>,
}

impl LmFlags {
    /// The handler that is meant, if any.
    pub(super) fn resolve(self) -> Result<Option<Arc<dyn LmHandler>>, Failure> {
        Ok(match (self.lm, &self.lm_script) {
            (Some(socket), _) => Some(Arc::new(socket)),
            (None, Some(path)) => Some(script(path)?),
            (None, None) => None,
        })
    }
}

fn script(path: &Path) -> Result<Arc<dyn LmHandler>, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::usage("--lm-script", format!("reading {}: {e}", path.display())))?;
    let handler = ScriptedHandler::from_json(&text)
        .map_err(|e| Failure::usage("--lm-script", format!("{}: {e}", path.display())))?;
    Ok(Arc::new(handler))
}

fn socket(text: &str) -> Result<SocketHandler, String> {
    SocketHandler::new(text).map_err(reason)
}
