//! `kaa run`: cells from files and flags, one after the other.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::Args;
use kaa::{Environment, Execution, Status};

use super::console::Console;
use super::flags::{SessionFlags, read_text};
use super::session;
use super::signals::Signals;
use super::{Ending, Failure, record};

/// A larger source is not one that anybody wrote.
const SOURCE_BYTES_MAX: u64 = 64 << 20;
/// What begins a cell in a file, as in other tools.
const CELL_MARKS: &[&str] = &["# %%", "#%%"];

/// Flags of `kaa run`.
#[derive(Debug, Args)]
pub(super) struct RunFlags {
    /// File of Python, one cell; `-` reads stdin
    #[arg(value_name = "FILE|-")]
    file: Option<PathBuf>,
    /// One cell of Python, run after FILE; may be repeated
    #[arg(short, long, value_name = "CODE", allow_hyphen_values = true)]
    code: Vec<String>,
    /// Split FILE into cells at lines that begin with `# %%`; what follows is the cell's title
    #[arg(long, requires = "file")]
    cells: bool,
    /// Print one JSON object per cell and line on stdout, and nothing else
    #[arg(long)]
    json: bool,
    /// Say nothing on stderr about progress, limits and the final answer
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    session: SessionFlags,
}

/// A piece of Python that is run as a whole.
#[derive(Debug, PartialEq, Eq)]
struct Cell {
    title: String,
    code: String,
}

/// Runs the cells.
pub(super) fn run(flags: RunFlags) -> Result<Ending, Failure> {
    let console = Console::new(flags.quiet);
    let stdin_taken = flags.file.as_deref().is_some_and(|path| path == Path::new("-"));
    let cells = cells(flags.file.as_deref(), flags.cells, flags.code)?;
    let plan = flags.session.resolve(stdin_taken.then_some("the cell's code"))?;
    let reactor = session::reactor()?;
    let base = session::prepare(&plan, console, &reactor)?;
    let result = reactor.block_on(async {
        let mut signals = Signals::listen()?;
        let mut environment = match signals.open(base.begin(&plan)).await? {
            ControlFlow::Continue(environment) => environment,
            ControlFlow::Break(ending) => return Ok(ending),
        };
        let result = async {
            let environment = &mut *environment;
            let ending = run_cells(environment, &cells, &mut signals, console, flags.json).await?;
            if let Some(path) = &plan.snapshot_out {
                session::save(environment, path, console).await?;
            }
            Ok::<_, Failure>(ending)
        };
        let result = result.await;
        let closed = environment.close().await;
        let ending = result?;
        closed?;
        Ok(ending)
    });
    reactor.shutdown_background();
    // Unmapping what the process is about to lose anyway takes as long as running a cell.
    std::mem::forget(base);
    result
}

/// What was typed as cells.
fn cells(file: Option<&Path>, split: bool, codes: Vec<String>) -> Result<Vec<Cell>, Failure> {
    let mut cells = Vec::new();
    if let Some(path) = file {
        let text = read_text("FILE", path, SOURCE_BYTES_MAX)?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        match split {
            true => cells.extend(split_cells(text)),
            false => cells.push(Cell { title: String::new(), code: text.to_owned() }),
        }
    } else if codes.is_empty() {
        return Err(Failure::Usage(
            "there is nothing to run: name a FILE (`-` for stdin) or pass code with -c; \
             see `kaa run --help`"
                .into(),
        ));
    }
    cells.extend(codes.into_iter().map(|code| Cell { title: String::new(), code }));
    Ok(cells)
}

/// The cells of a file. What is before the first mark is a cell unless it's blank.
fn split_cells(text: &str) -> Vec<Cell> {
    let mut cells = vec![Cell { title: String::new(), code: String::new() }];
    for line in text.split_inclusive('\n') {
        match CELL_MARKS.iter().find_map(|mark| line.strip_prefix(mark)) {
            Some(title) => {
                cells.push(Cell { title: title.trim().to_owned(), code: String::new() });
            }
            None => cells.last_mut().expect("there is a first").code.push_str(line),
        }
    }
    if cells.len() > 1 && cells[0].code.trim().is_empty() {
        cells.remove(0);
    }
    cells
}

async fn run_cells(
    environment: &mut dyn Environment,
    cells: &[Cell],
    signals: &mut Signals,
    console: Console,
    json: bool,
) -> Result<Ending, Failure> {
    let mut ending = Ending::Done;
    let mut final_answer = None;
    for (number, cell) in (1..).zip(cells) {
        let stop = async || {
            signals.next().await;
        };
        let execution = session::execute(environment, &cell.code, stop).await?;
        let name = cell_name(number, cells.len(), &cell.title);
        let status = environment.status();
        if json {
            console.line(&record::line(number, &execution, status))?;
        } else {
            show(&name, &execution, console)?;
        }
        if let Some(ending) = signals.seen() {
            return Ok(ending);
        }
        if status == Status::Poisoned {
            lost(&name, &execution, cells.len() - number, console)?;
        }
        ending = Ending::Cell(execution.outcome);
        final_answer = execution.final_answer.or(final_answer);
    }
    if let Some(answer) = final_answer.filter(|_| !json) {
        console.note(&format!("final answer: {answer}"));
    }
    Ok(ending)
}

/// A cell cost the session its state. Those after it were written for that state: without it they
/// would do something else than was meant.
fn lost(name: &str, execution: &Execution, left: usize, console: Console) -> Result<(), Failure> {
    let words = session::loss(name, execution);
    match left {
        0 => {
            console.note(&words);
            Ok(())
        }
        1 => Err(Failure::Failed(format!("{words}; the cell after it was not run"))),
        left => Err(Failure::Failed(format!("{words}; the {left} cells after it were not run"))),
    }
}

fn cell_name(number: usize, count: usize, title: &str) -> String {
    match (count, title) {
        (1, _) => "the cell".into(),
        (_, "") => format!("cell {number}"),
        (_, title) => format!("cell {number} ({title})"),
    }
}

fn show(name: &str, execution: &Execution, console: Console) -> Result<(), Failure> {
    let shown = console.out(&execution.stdout.bytes);
    console.err(&execution.stderr.bytes);
    for remark in session::remarks(name, execution) {
        console.note(&remark);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::{Cell, split_cells};

    fn split(text: &str) -> Vec<(String, String)> {
        split_cells(text).into_iter().map(|Cell { title, code }| (title, code)).collect()
    }

    #[test]
    fn a_file_is_split_at_its_marks() {
        let cells = [
            ("a = 1\n", vec![("", "a = 1\n")]),
            ("", vec![("", "")]),
            ("\n# %% one\na\n# %%\nb", vec![("one", "a\n"), ("", "b")]),
            ("a\n#%%two\r\nb\r\n", vec![("", "a\n"), ("two", "b\r\n")]),
            ("  # %% not at the margin\n", vec![("", "  # %% not at the margin\n")]),
        ];
        for (text, expected) in cells {
            let expected: Vec<_> =
                expected.into_iter().map(|(t, c)| (t.to_owned(), c.to_owned())).collect();
            assert_eq!(split(text), expected, "{text:?}");
        }
    }
}
