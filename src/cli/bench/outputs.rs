//! Where a report goes. Files are opened before anything is measured, so that minutes of measuring don't
//! end with a path that can't be written.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use kaa::benchmark::Report;

use crate::cli::Failure;
use crate::cli::console::Console;
use crate::cli::flags::read_text;

const BEGIN: &str = "<!-- kaa bench isolation -->";
const END: &str = "<!-- /kaa bench isolation -->";
/// No report and no page of documentation is longer.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// The files of the flags.
pub(super) struct Outputs {
    json: Option<Target>,
    plot: Option<Target>,
    markdown: Option<Target>,
}

struct Target {
    flag: &'static str,
    path: PathBuf,
}

/// Reads the report of `--from`.
pub(super) fn read(path: &Path) -> Result<Report, Failure> {
    let text = read_text("--from", path, FILE_BYTES_MAX)?;
    Report::from_json(&text).map_err(|error| Failure::usage("--from", error))
}

impl Outputs {
    pub(super) fn open(
        json: Option<PathBuf>,
        plot: Option<PathBuf>,
        markdown: Option<PathBuf>,
        from: Option<&Path>,
    ) -> Result<Self, Failure> {
        let target = |flag, path: Option<PathBuf>| path.map(|p| Target::open(flag, p)).transpose();
        let markdown = target("--markdown", markdown)?;
        markdown.as_ref().map(around).transpose()?;
        let outputs =
            Self { json: target("--json", json)?, plot: target("--plot", plot)?, markdown };
        outputs.check_differ(from)?;
        Ok(outputs)
    }

    /// Makes sure that nothing is written over what is read, or over another output. A device takes all.
    fn check_differ(&self, from: Option<&Path>) -> Result<(), Failure> {
        let mut seen: Vec<(&str, PathBuf)> = Vec::new();
        let targets = [&self.json, &self.plot, &self.markdown].into_iter().flatten();
        let outputs = targets.map(|target| (target.flag, &*target.path));
        for (flag, path) in from.map(|path| ("--from", path)).into_iter().chain(outputs) {
            // What can't be found is told by who opens it.
            let Ok(file) = path.canonicalize() else { continue };
            if let Some((other, _)) =
                seen.iter().find(|(_, known)| file.is_file() && *known == file)
            {
                let reason = format!("{} is the file of {other}, too", path.display());
                return Err(Failure::usage(flag, reason));
            }
            seen.push((flag, file));
        }
        Ok(())
    }

    /// Writes the files, and the table to stdout.
    pub(super) fn write(&self, report: &Report, console: Console) -> Result<(), Failure> {
        if let Some(target) = &self.json {
            target.write(&report.to_json())?;
        }
        let tables = report.markdown();
        console.line(tables.trim_end())?;
        if let Some(target) = &self.markdown {
            // Read again: somebody may have written in it while it was measured.
            let (before, after) = around(target)?;
            target.write(&format!("{before}{BEGIN}\n\n{tables}\n{END}{after}"))?;
        }
        if let Some(target) = &self.plot {
            let svg = report.plot().map_err(|error| Failure::usage(target.flag, error))?;
            target.write(&svg)?;
        }
        Ok(())
    }
}

impl Target {
    /// Makes sure that it can be written, without changing what is in it.
    fn open(flag: &'static str, path: PathBuf) -> Result<Self, Failure> {
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.map_err(|error| Failure::usage(flag, format!("{}: {error}", path.display())))?;
        Ok(Self { flag, path })
    }

    fn write(&self, text: &str) -> Result<(), Failure> {
        fs::write(&self.path, text)
            .map_err(|error| Failure::usage(self.flag, format!("{}: {error}", self.path.display())))
    }
}

/// What is before and after the tables in a page.
fn around(target: &Target) -> Result<(String, String), Failure> {
    let text = read_text(target.flag, &target.path, FILE_BYTES_MAX)?;
    if text.trim().is_empty() {
        return Ok((String::new(), "\n".into()));
    }
    let parts = text.split_once(BEGIN).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(END)?;
        Some((before.to_owned(), after.to_owned()))
    });
    parts.ok_or_else(|| {
        let reason = format!(
            "{} has something else in it; name a new file, or put the lines `{BEGIN}` and `{END}` where \
             the tables belong",
            target.path.display()
        );
        Failure::usage(target.flag, reason)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(text: &str) -> Result<(String, String), Failure> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("page.md");
        fs::write(&path, text).unwrap();
        around(&Target::open("--markdown", path)?)
    }

    #[test]
    fn no_file_is_for_two_things() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| Some(directory.path().join(name));
        fs::write(directory.path().join("report"), "{}").unwrap();
        std::os::unix::fs::symlink("plot", directory.path().join("link")).unwrap();
        let cases: [(_, _, _, _, Option<&str>); 6] = [
            (path("json"), path("plot"), path("page"), path("report"), None),
            (path("same"), path("same"), None, None, Some("--plot")),
            (path("json"), path("plot"), path("link"), None, Some("--markdown")),
            (None, path("report"), None, path("report"), Some("--plot")),
            (path("./json"), None, path("json"), None, Some("--markdown")),
            (Some("/dev/null".into()), Some("/dev/null".into()), None, None, None),
        ];
        for (json, plot, page, from, refused) in cases {
            let what = format!("{json:?} {plot:?} {page:?} {from:?}");
            match (Outputs::open(json, plot, page, from.as_deref()), refused) {
                (Ok(_), None) => {}
                (Err(Failure::Usage(reason)), Some(flag)) => {
                    assert!(reason.contains(flag), "{reason}")
                }
                _ => panic!("{what}"),
            }
        }
        assert_eq!(fs::read_to_string(directory.path().join("report")).unwrap(), "{}");
    }

    #[test]
    fn tables_go_between_the_marks_and_nowhere_else() {
        let found = page(&format!("a\n{BEGIN}\nold\n{END}\nb\n")).expect("it has marks");
        assert_eq!(found, ("a\n".into(), "\nb\n".into()));
        assert!(page("").is_ok());
        for text in ["a page", BEGIN, END, &format!("{END}{BEGIN}")] {
            match page(text) {
                Err(Failure::Usage(reason)) => assert!(reason.contains(BEGIN), "{reason}"),
                _ => panic!("{text} is no page for a table"),
            }
        }
    }
}
