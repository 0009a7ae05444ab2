//! `kaa snapshot`: what snapshot files are.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use kaa::{ClockRecord, SnapshotHeader, inspect_snapshot};
use serde_json::json;

use super::console::Console;
use super::session::is_pickle;
use super::units::megabytes;
use super::{Ending, Failure};

#[derive(Debug, Subcommand)]
pub(super) enum SnapshotCommand {
    /// Show what a snapshot file says about itself
    ///
    /// Reads and checks the header only; `kaa run --snapshot-in` checks the whole file. Nothing in
    /// it is run.
    Inspect(InspectFlags),
}

#[derive(Debug, Args)]
pub(super) struct InspectFlags {
    /// File that `--snapshot-out` or `:save` has written
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: SnapshotCommand) -> Result<Ending, Failure> {
    let SnapshotCommand::Inspect(InspectFlags { file, json }) = command;
    let console = Console::new(false);
    if is_pickle(&file) {
        let reason = "it is of a session that isn't wasm's, a pickle of dill; what is in it only shows \
                      when a session runs it, with --snapshot-in";
        return Err(Failure::usage(&file.display().to_string(), reason));
    }
    let header = inspect_snapshot(&file).map_err(|error| match error {
        kaa::Error::Io { source, .. } => Failure::usage(&file.display().to_string(), source),
        kaa::Error::Incompatible { .. } => Failure::usage(&file.display().to_string(), error),
        other => other.into(),
    })?;
    if json {
        console.line(&record(&header).to_string())?;
    } else {
        show(console, &header)?;
    }
    Ok(Ending::Done)
}

fn record(header: &SnapshotHeader) -> serde_json::Value {
    let session = &header.session;
    let told = session.told.as_ref().map(|told| {
        json!({
            "profile": told.profile, "lm": told.lm, "tools": told.tools,
            "env": told.env.keys().collect::<Vec<_>>(), "allowed_imports": told.allowed_imports,
        })
    });
    json!({
        "kaa": header.kaa, "python": header.python,
        "image": { "name": header.image.name, "key": header.image.key },
        "memory_bytes": header.memory_bytes, "pages": header.pages,
        "files": header.files, "file_bytes": header.file_bytes,
        "cells": session.cells, "seed": session.seed,
        "clock": session.clock.map(time), "told": told,
    })
}

/// What the session's clock shows, in nanoseconds since 1970.
fn time(clock: ClockRecord) -> u64 {
    // The numbers are the file's, whatever it says they are.
    clock.start_ns.saturating_add(clock.elapsed_ns)
}

fn show(console: Console, header: &SnapshotHeader) -> Result<(), Failure> {
    // The texts are the file's: a line break in one must not look like a line of this output.
    let text = |text: &str| text.escape_debug().to_string();
    let session = &header.session;
    let mut lines = vec![
        ("image", format!("{} {}", text(&header.image.name), text(&header.image.key))),
        ("python", text(&header.python)),
        ("kaa", text(&header.kaa)),
        ("memory", megabytes(header.memory_bytes)),
        ("written", megabytes(header.pages * 4096)),
        ("files", format!("{} with {}", header.files, megabytes(header.file_bytes))),
        ("cells", session.cells.to_string()),
    ];
    if let Some(told) = &session.told {
        let names = |names: &mut dyn Iterator<Item = &String>| {
            let names: Vec<_> = names.map(|name| text(name)).collect();
            if names.is_empty() { "none".to_owned() } else { names.join(" ") }
        };
        lines.push(("profile", text(&told.profile)));
        lines.push(("tools", names(&mut told.tools.iter())));
        lines.push(("env", names(&mut told.env.keys())));
    }
    if let Some(seed) = session.seed {
        lines.push(("seed", seed.to_string()));
    }
    if let Some(clock) = session.clock {
        lines.push(("clock", format!("{} s since 1970", time(clock) / 1_000_000_000)));
    }
    lines.iter().try_for_each(|(name, value)| console.line(&format!("{name:<10} {value}")))
}
