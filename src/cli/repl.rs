//! `kaa repl`: cells from the keyboard, or line by line from a pipe.

use std::io::{self, BufRead, IsTerminal};
use std::path::{Path, PathBuf};

use clap::Args;
use kaa::{Environment, Execution, Profile, Usage};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::Validator;
use rustyline::{Config, Editor, Helper};
use tokio::signal::unix::Signal;

use super::branches::Branches;
use super::completion::needs_more;
use super::console::Console;
use super::flags::SessionFlags;
use super::session::{self, Base, Plan};
use super::units::megabytes;
use super::{Ending, Failure, signals};

const PROMPT: &str = ">>> ";
const PROMPT_MORE: &str = "... ";
const INDENT: &str = "    ";
/// What to do when a session has lost its state.
const GO_ON: &str = ":reset begins anew, with the contexts and variables of the command line";
const HISTORY_LINES_MAX: usize = 10_000;
const HELP: &str = "\
An empty line ends a block. Ctrl-C stops the running cell, Ctrl-D ends the session.
:vars        list the variables
:usage       what the last cell and the session have spent
:rewind [N]  undo the last cell, or the last N, with all that they changed (wasm)
:fork        go on in a copy of the session; the first one stays as it is
:go N        go to session N of those that were forked
:save FILE   save the session, for --snapshot-in
:reset       begin anew, with the contexts and variables of the command line
:help        this text
:quit        end
";

/// Flags of `kaa repl`.
#[derive(Debug, Args)]
pub(super) struct ReplFlags {
    /// Say nothing on stderr about progress and limits
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    session: SessionFlags,
}

/// Runs a session until its input ends.
pub(super) fn run(flags: ReplFlags) -> Result<Ending, Failure> {
    let console = Console::new(flags.quiet);
    let plan = flags.session.resolve(Some("where cells are typed"))?;
    let reactor = session::reactor()?;
    let base = session::prepare(&plan, console, &reactor)?;
    let mut input = Input::open()?;
    if matches!(input, Input::Keyboard { .. }) {
        console.note(&format!("{}. :help shows the commands.", base.what()));
    }
    let interrupts = reactor.block_on(async { signals::interrupts() })?;
    let environment = reactor.block_on(base.begin(&plan))?;
    let total = nothing_spent(&*environment);
    let mut repl = Repl {
        branches: Branches::new(environment),
        base,
        plan,
        console,
        interrupts,
        reactor,
        last: None,
        total,
    };
    let result = repl.take_cells(&mut input).and_then(|()| repl.save_at_end());
    input.save();
    let Repl { branches, reactor, .. } = repl;
    let closed = reactor.block_on(branches.close());
    reactor.shutdown_background();
    result?;
    closed?;
    Ok(Ending::Done)
}

/// A session with someone in front of it.
struct Repl {
    branches: Branches,
    base: Base,
    plan: Plan,
    console: Console,
    interrupts: Signal,
    reactor: tokio::runtime::Runtime,
    last: Option<Usage>,
    total: Usage,
}

impl Repl {
    fn take_cells(&mut self, input: &mut Input) -> Result<(), Failure> {
        let mut cell = String::new();
        loop {
            let prompt = if cell.is_empty() { self.prompt() } else { PROMPT_MORE.to_owned() };
            match input.line(&prompt)? {
                Line::Text(line) if cell.is_empty() && line.starts_with(':') => {
                    input.remember(&line);
                    if line.trim() == ":quit" {
                        return Ok(());
                    }
                    self.command(line.trim())?;
                }
                Line::Text(line) => {
                    if cell.is_empty() && line.trim().is_empty() {
                        continue;
                    }
                    cell.push_str(&line);
                    cell.push('\n');
                    if !needs_more(cell.strip_suffix('\n').unwrap_or(&cell)) {
                        let cell = std::mem::take(&mut cell);
                        input.remember(cell.trim_end());
                        self.execute(&cell)?;
                    }
                }
                Line::Cleared => cell.clear(),
                Line::End => {
                    if !cell.is_empty() {
                        self.execute(&cell)?;
                    }
                    return Ok(());
                }
            }
        }
    }

    /// With the session's number, when there are several.
    fn prompt(&self) -> String {
        match self.branches.place() {
            (_, 1) => PROMPT.to_owned(),
            (number, _) => format!("{number} {PROMPT}"),
        }
    }

    fn save_at_end(&mut self) -> Result<(), Failure> {
        let Some(path) = &self.plan.snapshot_out else { return Ok(()) };
        let saving = session::save(self.branches.environment(), path, self.console);
        self.reactor.block_on(saving)
    }

    fn execute(&mut self, code: &str) -> Result<(), Failure> {
        // Ctrl-C that came while nothing ran means nothing now.
        self.reactor.block_on(async {
            loop {
                tokio::select! {
                    biased;
                    _ = self.interrupts.recv() => {}
                    () = std::future::ready(()) => break,
                }
            }
        });
        let execution = self.reactor.block_on(async {
            self.branches.remember().await;
            let stop = async || {
                self.interrupts.recv().await;
            };
            session::execute(self.branches.environment(), code, stop).await
        });
        match execution {
            Ok(execution) => self.show(&execution),
            Err(error) => {
                self.fail(error.into());
                Ok(())
            }
        }
    }

    /// Says what went wrong, which ends nothing, and how to go on where the session can't.
    fn fail(&mut self, failure: Failure) {
        match failure {
            Failure::Usage(message) => self.console.complain(&message),
            Failure::Failed(message) if session::is_lost(self.branches.environment()) => {
                self.console.complain(&format!("{message}; {GO_ON}"));
            }
            Failure::Failed(message) => self.console.complain(&message),
            Failure::Closed => {}
        }
    }

    fn show(&mut self, execution: &Execution) -> Result<(), Failure> {
        self.console.out(&execution.stdout.bytes)?;
        let open_line = execution.stdout.bytes.last().is_some_and(|byte| *byte != b'\n');
        // In the other profile the value is part of the output.
        let value = execution.value.as_ref().filter(|_| self.plan.options.profile == Profile::Rlm);
        if open_line && (value.is_some() || self.console.out_terminal) {
            self.console.out(b"\n")?;
        }
        if let Some(value) = value {
            self.console.line(value)?;
        }
        self.console.err(&execution.stderr.bytes);
        for remark in session::remarks("the cell", execution) {
            self.console.note(&remark);
        }
        let is_lost = session::is_lost(self.branches.environment());
        if let kaa::Outcome::Exited { code } = execution.outcome
            && !is_lost
        {
            self.console.note(&format!("the cell exited with {code}; :quit ends the session"));
        }
        if is_lost {
            let loss = session::loss("the cell", execution);
            self.console.complain(&format!("{loss}; {GO_ON}"));
        }
        if let Some(answer) = &execution.final_answer {
            self.console.note(&format!("final answer: {answer}"));
        }
        let (total, usage) = (&mut self.total, &execution.usage);
        if let Some(fuel) = usage.fuel {
            total.fuel = Some(total.fuel.unwrap_or(0) + fuel);
        }
        total.compute += usage.compute;
        total.wall += usage.wall;
        total.host_wait += usage.host_wait;
        total.memory_bytes = usage.memory_bytes;
        total.lm_calls += usage.lm_calls;
        total.tool_calls += usage.tool_calls;
        self.last = Some(usage.clone());
        Ok(())
    }

    fn command(&mut self, command: &str) -> Result<(), Failure> {
        let (name, argument) = command.split_once(' ').unwrap_or((command, ""));
        match self.obey(name, argument.trim()) {
            Err(Failure::Closed) => Err(Failure::Closed),
            Err(failure) => {
                self.fail(failure);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn obey(&mut self, command: &str, argument: &str) -> Result<(), Failure> {
        let number = |default: Option<usize>| match (argument, default) {
            ("", Some(number)) => Ok(number),
            ("", None) => Err(Failure::Usage(format!("write a number after `{command}`"))),
            _ => argument.parse::<usize>().map_err(|_| {
                Failure::Usage(format!("write a number after `{command}`, not `{argument}`"))
            }),
        };
        match command {
            ":vars" => {
                let variables = self.branches.environment().list_variables();
                for variable in self.reactor.block_on(variables)? {
                    let kaa::Variable { name, type_name, repr, .. } = variable;
                    self.console.line(&format!("{name}: {type_name} = {repr}"))?;
                }
            }
            ":usage" => {
                if let Some(last) = &self.last {
                    self.console.line(&format!("last cell: {}", usage_text(last)))?;
                }
                self.console.line(&format!("session: {}", usage_text(&self.total)))?;
            }
            ":rewind" => {
                let (cells, limits) = (number(Some(1))?, &self.plan.options.limits);
                self.reactor.block_on(self.branches.rewind(&self.base, limits, cells))?;
            }
            ":fork" => {
                let (from, _) = self.branches.place();
                let unsaved = self.reactor.block_on(self.branches.fork())?;
                let (number, _) = self.branches.place();
                if let Some(names) = unsaved {
                    self.console.complain(&format!("the copy is without {names}"));
                }
                self.console.note(&format!("session {number}, a copy of session {from}"));
            }
            ":go" => self.branches.go_to(number(None)?)?,
            ":save" if !argument.is_empty() => {
                let path = Path::new(argument);
                let saving = session::save(self.branches.environment(), path, self.console);
                self.reactor.block_on(saving)?;
            }
            ":save" => return Err(Failure::Usage("write a file after `:save`".into())),
            ":reset" => self.reset()?,
            ":help" => self.console.out(HELP.as_bytes())?,
            other => {
                let reason = format!("there is no command `{other}`; see :help");
                return Err(Failure::Usage(reason));
            }
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Failure> {
        let Plan { contexts, variables, .. } = &self.plan;
        let (contexts, variables) = (contexts.clone(), variables.clone());
        let environment = self.branches.environment();
        self.reactor.block_on(async {
            self.base.reset(environment).await?;
            session::fill(environment, contexts, variables).await
        })?;
        self.branches.forget();
        self.last = None;
        self.total = nothing_spent(self.branches.environment());
        Ok(())
    }
}

/// Usage before the first cell.
fn nothing_spent(environment: &dyn Environment) -> Usage {
    let fuel = environment.capabilities().fuel.then_some(0);
    Usage { fuel, ..Usage::default() }
}

fn usage_text(usage: &Usage) -> String {
    let fuel = usage.fuel.map(|fuel| format!("{fuel} fuel, ")).unwrap_or_default();
    format!(
        "{fuel}{:.3} s computed, {:.3} s waited, {:.3} s in all, {} of memory, {} LM calls, \
         {} tool calls",
        usage.compute.as_secs_f64(),
        usage.host_wait.as_secs_f64(),
        usage.wall.as_secs_f64(),
        megabytes(usage.memory_bytes),
        usage.lm_calls,
        usage.tool_calls
    )
}

/// Where lines come from.
enum Input {
    Keyboard { editor: Box<Editor<Keys, FileHistory>>, history: PathBuf },
    Pipe,
}

/// What came.
enum Line {
    Text(String),
    /// Ctrl-C at the prompt.
    Cleared,
    End,
}

impl Input {
    fn open() -> Result<Self, Failure> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Pipe);
        }
        let history = session::store()?.root().join("history");
        let failed = |e: ReadlineError| Failure::Failed(format!("reading the terminal: {e}"));
        let config = Config::builder()
            .max_history_size(HISTORY_LINES_MAX)
            .map_err(failed)?
            .auto_add_history(false)
            .build();
        let mut editor = Editor::with_config(config).map_err(failed)?;
        editor.set_helper(Some(Keys));
        // There is none the first time.
        let _ = editor.load_history(&history);
        Ok(Self::Keyboard { editor: Box::new(editor), history })
    }

    fn line(&mut self, prompt: &str) -> Result<Line, Failure> {
        match self {
            Self::Keyboard { editor, .. } => match editor.readline(prompt) {
                Ok(line) => Ok(Line::Text(line)),
                Err(ReadlineError::Interrupted) => Ok(Line::Cleared),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(e) => Err(Failure::Failed(format!("reading the terminal: {e}"))),
            },
            Self::Pipe => {
                let mut line = String::new();
                match io::stdin().lock().read_line(&mut line) {
                    Ok(0) => Ok(Line::End),
                    Ok(_) => Ok(Line::Text(line.trim_end_matches(['\n', '\r']).to_owned())),
                    Err(e) => Err(Failure::usage("stdin", e)),
                }
            }
        }
    }

    fn remember(&mut self, cell: &str) {
        if let Self::Keyboard { editor, .. } = self {
            // A history that is full or can't be kept is no reason to stop.
            let _ = editor.add_history_entry(cell);
        }
    }

    fn save(&mut self) {
        if let Self::Keyboard { editor, history } = self {
            let _ = editor.save_history(history);
        }
    }
}

/// Tab indents.
struct Keys;

impl Completer for Keys {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let blank = line[..position].chars().all(char::is_whitespace);
        Ok((position, if blank { vec![INDENT.to_owned()] } else { Vec::new() }))
    }
}

impl Hinter for Keys {
    type Hint = String;
}
impl Highlighter for Keys {}
impl Validator for Keys {}
impl Helper for Keys {}
