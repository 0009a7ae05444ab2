//! Images of the stand-in: layers of commands that are run once, with logs that can be read again.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::watch;
use tonic::Status;

use super::packages;
use super::proto::client::generic_result::GenericStatus;
use super::proto::client::{BaseImage, GenericResult, Image as Definition};
use super::proto::client::{ImageGetOrCreateRequest, ImageJoinStreamingResponse, TaskLogs};
use super::world::World;

/// What tells layers from each other: the images below, and the commands.
pub(crate) type LayerKey = (Vec<(String, String)>, Vec<String>);

const PYTHON: &str = "python3";
const PIP: &[&str] = &["python -m pip install ", "python3 -m pip install ", "pip install "];

/// An image, whether or not it's built yet.
pub(crate) struct Image {
    pub(crate) id: String,
    /// Its files.
    folder: PathBuf,
    /// Directories of packages, its own first.
    packages: Vec<PathBuf>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) workdir: String,
    /// The lines so far, and how it ended.
    build: watch::Receiver<Build>,
}

#[derive(Debug, Default)]
struct Build {
    log: Vec<String>,
    result: Option<GenericResult>,
}

impl Image {
    pub(crate) fn result(&self) -> Option<GenericResult> {
        self.build.borrow().result.clone()
    }

    pub(crate) fn python_path(&self) -> Option<String> {
        let folders: Vec<PathBuf> = self.packages.iter().filter(|f| f.exists()).cloned().collect();
        let joined = std::env::join_paths(&folders).ok()?.into_string().ok()?;
        (!folders.is_empty()).then_some(joined)
    }

    /// Copies its files to where there is nothing yet.
    pub(crate) fn copy_to(&self, to: &Path) -> io::Result<()> {
        copy(&self.folder, to)?;
        let tmp = to.join("tmp");
        std::fs::create_dir_all(&tmp)?;
        // A guest that isn't root writes there, as anywhere.
        std::fs::set_permissions(&tmp, std::fs::Permissions::from_mode(0o1777))
    }

    /// The logs after `last`, as they're written, then the result; without one after `timeout`.
    pub(crate) fn join(
        &self,
        last: &str,
        timeout: Duration,
    ) -> BoxStream<'static, Result<ImageJoinStreamingResponse, Status>> {
        let seen = last.split('-').next().and_then(|number| number.parse().ok()).unwrap_or(0);
        let deadline = tokio::time::Instant::now() + timeout;
        let next = move |(mut build, seen, is_over): (watch::Receiver<Build>, usize, bool)| async move {
            if is_over {
                return None;
            }
            // So that each message is on its way before the next: faults come between them.
            tokio::task::yield_now().await;
            let news = build.wait_for(|now| now.log.len() > seen || now.result.is_some());
            let message = match tokio::time::timeout_at(deadline, news).await {
                Err(_) | Ok(Err(_)) => return None,
                Ok(Ok(now)) => match now.log.get(seen) {
                    Some(line) => ImageJoinStreamingResponse {
                        task_logs: vec![TaskLogs { data: line.clone() }],
                        entry_id: format!("{}-0", seen + 1),
                        ..ImageJoinStreamingResponse::default()
                    },
                    None => ImageJoinStreamingResponse {
                        result: now.result.clone(),
                        eof: true,
                        ..ImageJoinStreamingResponse::default()
                    },
                },
            };
            let is_over = message.result.is_some();
            Some((Ok(message), (build, seen + 1, is_over)))
        };
        stream::unfold((self.build.clone(), seen, false), next).boxed()
    }
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let status = Command::new("cp").arg("-a").arg("--").args([from, to]).status()?;
    status.success().then_some(()).ok_or_else(|| io::Error::other("`cp -a` failed"))
}

impl World {
    /// The image of a layer: the one that was built, or one whose build begins now.
    pub(crate) fn layer(&self, request: ImageGetOrCreateRequest) -> Result<Arc<Image>, Status> {
        let definition = request.image.unwrap_or_default();
        if definition.dockerfile_commands.is_empty() {
            return Err(Status::invalid_argument("an image has no commands"));
        }
        let base = |base: &BaseImage| (base.docker_tag.clone(), base.image_id.clone());
        let bases: Vec<_> = definition.base_images.iter().map(base).collect();
        let key: LayerKey = (bases, definition.dockerfile_commands.clone());
        let mut layers = self.layers.lock().unwrap();
        if let Some(id) = layers.get(&key)
            && !request.force_build
        {
            let image = self.image(id)?;
            // What failed is built again.
            let success = i32::from(GenericStatus::Success);
            if image.result().is_none_or(|result| result.status == success) {
                return Ok(image);
            }
        }
        let image = self.begin_build(&definition)?;
        layers.insert(key, image.id.clone());
        Ok(image)
    }

    fn begin_build(&self, definition: &Definition) -> Result<Arc<Image>, Status> {
        let id = self.id("im", "");
        let folder = self.folder.join(&id);
        let own_packages = self.folder.join(format!("{id}.packages"));
        let mut packages = vec![own_packages.clone()];
        let (mut env, mut workdir) = (HashMap::new(), "/".to_owned());
        let mut below = None;
        for base in &definition.base_images {
            let image = self.image(&base.image_id)?;
            let success = i32::from(GenericStatus::Success);
            if image.result().is_none_or(|result| result.status != success) {
                let message = format!("Image {:?} isn't built", base.image_id);
                return Err(Status::failed_precondition(message));
            }
            packages.extend(image.packages.iter().cloned());
            env.extend(image.env.iter().cloned());
            workdir.clone_from(&image.workdir);
            below = Some(image);
        }
        let mut plan = Plan::of(definition, &mut env, &mut workdir);
        // The shared installation is a directory of its own.
        for step in &mut plan.steps {
            if matches!(step, Step::Pip(arguments) if arguments == "dill") {
                match packages::installed(PYTHON, packages::DILL) {
                    Ok(folder) => {
                        packages.insert(0, folder);
                        *step = Step::Note("Successfully installed dill".into());
                    }
                    Err(reason) => *step = Step::Fail(reason),
                }
            }
        }
        let (tell, build) = watch::channel(Build::default());
        let env: Vec<_> = env.into_iter().collect();
        let image = Image { id: id.clone(), folder: folder.clone(), packages, env, workdir, build };
        let variables = image.env.clone();
        let image = Arc::new(image);
        self.images.lock().unwrap().insert(id.clone(), image.clone());
        tokio::task::spawn_blocking(move || {
            let made = match &below {
                Some(below) => copy(&below.folder, &folder),
                None => std::fs::create_dir(&folder),
            };
            let builder = Builder { tell, folder, packages: own_packages, variables };
            let ended = made.map_err(|error| error.to_string()).and_then(|()| builder.run(plan));
            builder.end(&id, ended);
        });
        Ok(image)
    }

    /// The image of a sandbox's files as they are now.
    pub(crate) fn snapshot(&self, root: &Path, from: &Image) -> Result<Arc<Image>, Status> {
        let id = self.id("im", "");
        let folder = self.folder.join(&id);
        copy(root, &folder).map_err(|error| Status::internal(error.to_string()))?;
        let status = GenericStatus::Success.into();
        let result = Some(GenericResult { status, ..GenericResult::default() });
        let (_, build) = watch::channel(Build { log: Vec::new(), result });
        let image = Arc::new(Image {
            id: id.clone(),
            folder,
            packages: from.packages.clone(),
            env: from.env.clone(),
            workdir: from.workdir.clone(),
            build,
        });
        self.images.lock().unwrap().insert(id, image.clone());
        Ok(image)
    }
}

enum Step {
    /// Only said.
    Note(String),
    Pip(String),
    Shell(String),
    Fail(String),
}

/// What the commands of a layer come to.
struct Plan {
    steps: Vec<Step>,
}

impl Plan {
    fn of(
        definition: &Definition,
        env: &mut HashMap<String, String>,
        workdir: &mut String,
    ) -> Self {
        let is_base = |name: &str| definition.base_images.iter().any(|b| b.docker_tag == name);
        let mut steps = Vec::new();
        for command in &definition.dockerfile_commands {
            let (word, rest) = command.trim().split_once(' ').unwrap_or((command, ""));
            let rest = rest.trim();
            steps.push(Step::Note(format!("=> {command}")));
            steps.push(match word {
                "FROM" if is_base(rest) || rest.starts_with("python:") => continue,
                "FROM" => Step::Fail(format!(
                    "manifest for {rest} not found: manifest unknown: manifest unknown"
                )),
                "RUN" => match PIP.iter().find_map(|prefix| rest.strip_prefix(prefix)) {
                    Some(arguments) => Step::Pip(arguments.to_owned()),
                    None if rest.starts_with("apt-get ") => Step::Note("(not run here)".into()),
                    None => Step::Shell(rest.to_owned()),
                },
                "ENV" => match rest.split_once('=') {
                    Some((name, value)) => {
                        env.insert(name.to_owned(), unquoted(value));
                        continue;
                    }
                    None => Step::Fail(format!("ENV needs NAME=VALUE, not {rest:?}")),
                },
                "WORKDIR" => {
                    rest.clone_into(workdir);
                    continue;
                }
                "CMD" | "ENTRYPOINT" => continue,
                _ => Step::Fail(format!("the stand-in doesn't know {word}")),
            });
        }
        Self { steps }
    }
}

/// A word as a shell reads it: quotes of both kinds around parts of it.
fn unquoted(word: &str) -> String {
    let (mut quote, mut text) = (None, String::new());
    for c in word.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            None if c == '\'' || c == '"' => quote = Some(c),
            _ => text.push(c),
        }
    }
    text
}

struct Builder {
    tell: watch::Sender<Build>,
    folder: PathBuf,
    packages: PathBuf,
    variables: Vec<(String, String)>,
}

impl Builder {
    fn say(&self, line: &str) {
        self.tell.send_modify(|build| build.log.push(format!("{line}\n")));
    }

    fn run(&self, plan: Plan) -> Result<(), String> {
        for step in plan.steps {
            match step {
                Step::Note(line) => self.say(&line),
                Step::Fail(reason) => {
                    self.say(&format!("ERROR: {reason}"));
                    return Err(reason);
                }
                Step::Shell(command) => self.shell(&command)?,
                Step::Pip(arguments) => {
                    let target = self.packages.display();
                    self.shell(&format!(
                        "{PYTHON} -m pip install --disable-pip-version-check --no-input \
                         --progress-bar off --target {target} {arguments}"
                    ))?;
                }
            }
        }
        Ok(())
    }

    /// Runs a command in the image's directory; what it writes is the log.
    fn shell(&self, command: &str) -> Result<(), String> {
        let both = format!("exec 2>&1\n{command}");
        let mut child = Command::new("sh")
            .args(["-c", &both])
            .current_dir(&self.folder)
            .envs(self.variables.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let output = BufReader::new(child.stdout.take().expect("it's piped"));
        for line in output.split(b'\n').map_while(Result::ok) {
            self.say(&String::from_utf8_lossy(&line));
        }
        let status = child.wait().map_err(|error| error.to_string())?;
        let failed = || format!("The command '{command}' failed: {status}");
        status.success().then_some(()).ok_or_else(failed)
    }

    fn end(self, id: &str, ended: Result<(), String>) {
        let (status, exception) = match ended {
            Ok(()) => (GenericStatus::Success, String::new()),
            Err(reason) => {
                let words = format!("Image build for {id} failed. See build logs. {reason}");
                (GenericStatus::Failure, words)
            }
        };
        let result = GenericResult { status: status.into(), exception, exitcode: 0 };
        self.tell.send_modify(|build| build.result = Some(result));
    }
}
