//! `kaa image`: what sessions start from.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, Subcommand};
use kaa::{ImageManifest, ImageSpec, Runtime};
use serde::Serialize;

use super::console::Console;
use super::flags::exists;
use super::progress::Display;
use super::session::store;
use super::units::megabytes;
use super::{Ending, Failure};

/// The images that come with Kaa, in the order of their making.
const BUILT_IN: &[&str] = &["base", "sci"];

#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// Make an image; without NAME those that come with Kaa, `base` and `sci`
    Build(BuildFlags),
    /// List the images
    List(ListFlags),
    /// Show what an image is
    Inspect(InspectFlags),
    /// Remove an image
    Remove(NameFlags),
    /// Read every byte of an image, or of all, and compare it with its checksum
    Verify(VerifyFlags),
    /// Remove what no named image needs: images and compiled code of older versions
    Prune,
}

/// The recipe of an image.
#[derive(Debug, Args)]
pub(super) struct BuildFlags {
    /// Name of the new image
    name: Option<String>,
    /// Image to start from
    #[arg(long, value_name = "NAME", requires = "name")]
    from: Option<String>,
    /// File of Python that runs once; every session finds what it leaves
    #[arg(long, value_name = "FILE.py", requires = "name")]
    setup: Option<PathBuf>,
    /// Directory whose modules and packages become importable; may be repeated
    #[arg(long, value_name = "DIR", requires = "name")]
    path: Vec<PathBuf>,
    /// Wheel without native code whose packages become importable; may be repeated
    #[arg(long, value_name = "FILE.whl", requires = "name")]
    pure_wheel: Vec<PathBuf>,
    /// Module that sessions find already imported; may be repeated
    #[arg(long, value_name = "MODULE", requires = "name")]
    import: Vec<String>,
    /// Wheel of the guest, for a machine without network; otherwise pip downloads it
    #[arg(long, value_name = "PATH")]
    wheel: Option<PathBuf>,
    /// Say nothing on stderr about progress
    #[arg(long)]
    quiet: bool,
}

#[derive(Debug, Args)]
pub(super) struct ListFlags {
    /// Print one JSON object per image and line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct InspectFlags {
    name: String,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct NameFlags {
    name: String,
}

#[derive(Debug, Args)]
pub(super) struct VerifyFlags {
    name: Option<String>,
}

pub(super) fn run(command: ImageCommand) -> Result<Ending, Failure> {
    let console = Console::new(false);
    match command {
        ImageCommand::Build(flags) => build(&flags),
        ImageCommand::List(flags) => list(console, flags.json),
        ImageCommand::Inspect(flags) => inspect(console, &flags),
        ImageCommand::Remove(flags) => {
            store()?.remove(&flags.name)?;
            console.note(&format!("removed the image `{}`", flags.name));
            Ok(Ending::Done)
        }
        ImageCommand::Verify(flags) => verify(console, flags.name),
        ImageCommand::Prune => {
            let freed = Runtime::open(store()?)?.prune()?;
            console.note(&format!("removed {:.1} MB", freed as f64 / 1e6));
            Ok(Ending::Done)
        }
    }
}

fn build(flags: &BuildFlags) -> Result<Ending, Failure> {
    let console = Console::new(flags.quiet);
    let named = [("--setup", &flags.setup), ("--wheel", &flags.wheel)];
    for (flag, path) in named {
        path.iter().try_for_each(|path| exists(flag, path))?;
    }
    flags.path.iter().try_for_each(|path| exists("--path", path))?;
    flags.pure_wheel.iter().try_for_each(|path| exists("--pure-wheel", path))?;
    let runtime = Runtime::open(store()?)?;
    let display = Display::new(console);
    let progress = |report| display.show(report);
    let wheel = flags.wheel.as_deref();
    let images = match flags.name.as_deref() {
        None => BUILT_IN
            .iter()
            .map(|name| runtime.image_from(name, wheel, &progress))
            .collect::<Result<Vec<_>, _>>()?,
        Some(name) if BUILT_IN.contains(&name) && flags.is_plain() => {
            vec![runtime.image_from(name, wheel, &progress)?]
        }
        Some(name) => {
            let spec = flags.spec(name);
            // The parent brings the compiled guest along, for which the wheel may be needed.
            runtime.image_from(&spec.from, wheel, &progress)?;
            vec![runtime.build(&spec, &progress)?]
        }
    };
    drop(display);
    for image in images {
        let manifest = image.manifest();
        let name = flags.name.as_deref().unwrap_or(&manifest.name);
        console.line(&row(name, manifest))?;
    }
    Ok(Ending::Done)
}

impl BuildFlags {
    /// Whether nothing is asked but the image of this name.
    fn is_plain(&self) -> bool {
        self.from.is_none()
            && self.setup.is_none()
            && self.path.is_empty()
            && self.pure_wheel.is_empty()
            && self.import.is_empty()
    }

    fn spec(&self, name: &str) -> ImageSpec {
        ImageSpec {
            from: self.from.clone().unwrap_or_else(|| BUILT_IN[0].to_owned()),
            setup: self.setup.clone(),
            paths: self.path.clone(),
            pure_wheels: self.pure_wheel.clone(),
            imports: self.import.clone(),
            ..ImageSpec::new(name)
        }
    }
}

/// An image in a list.
fn row(name: &str, manifest: &ImageManifest) -> String {
    format!(
        "{name:<16} Python {:<8} {:>9}  {:>3} imports  {}",
        manifest.python,
        megabytes(manifest.memory_bytes),
        manifest.imports.len(),
        &manifest.key[..12.min(manifest.key.len())],
    )
}

/// An image as JSON.
#[derive(Serialize)]
struct ImageRecord<'a> {
    name: &'a str,
    key: &'a str,
    python: &'a str,
    memory_bytes: u64,
    /// The name of the image that it was made from, or its key when no name stands for it.
    from: Option<String>,
    module: &'a str,
    files: bool,
    imports: &'a [String],
}

fn image_record<'a>(
    name: &'a str,
    manifest: &'a ImageManifest,
    names: &[(String, kaa::Result<ImageManifest>)],
) -> ImageRecord<'a> {
    let from = manifest.parent.as_ref().map(|parent| {
        let known = names.iter().find(|(_, m)| m.as_ref().is_ok_and(|m| m.key == *parent));
        known.map_or_else(|| parent.clone(), |(name, _)| name.clone())
    });
    ImageRecord {
        name,
        key: &manifest.key,
        python: &manifest.python,
        memory_bytes: manifest.memory_bytes,
        from,
        module: &manifest.module,
        files: manifest.site,
        imports: &manifest.imports,
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("records have only text keys")
}

fn list(console: Console, as_json: bool) -> Result<Ending, Failure> {
    let images = store()?.list()?;
    for (name, manifest) in &images {
        match manifest {
            Ok(manifest) if as_json => {
                console.line(&json(&image_record(name, manifest, &images)))?;
            }
            Ok(manifest) => console.line(&row(name, manifest))?,
            Err(error) if as_json => console
                .line(&json(&serde_json::json!({ "name": name, "error": error.to_string() })))?,
            Err(error) => console.line(&format!("{name:<16} can't be used: {error}"))?,
        }
    }
    if images.is_empty() && !as_json {
        console.note("there are no images yet; `kaa image build` makes them");
    }
    Ok(Ending::Done)
}

fn inspect(console: Console, flags: &InspectFlags) -> Result<Ending, Failure> {
    let store = store()?;
    let manifest = store.manifest_by_name(&flags.name)?;
    let images = store.list()?;
    let record = image_record(&flags.name, &manifest, &images);
    if flags.json {
        console.line(&json(&record))?;
        return Ok(Ending::Done);
    }
    let from = record.from.as_deref().unwrap_or("the compiled guest");
    let files = if record.files { "yes" } else { "no" };
    console.line(&format!(
        "name     {}\nkey      {}\nfrom     {from}\npython   {}\nmemory   {}\nfiles    {files}\n\
         module   {}\nimports  {}",
        record.name,
        record.key,
        record.python,
        megabytes(record.memory_bytes),
        record.module,
        record.imports.join(" "),
    ))?;
    Ok(Ending::Done)
}

fn verify(console: Console, name: Option<String>) -> Result<Ending, Failure> {
    let store = store()?;
    let names = match name {
        Some(name) => vec![name],
        None => store.list()?.into_iter().map(|(name, _)| name).collect(),
    };
    if names.is_empty() {
        console.note("there are no images yet; `kaa image build` makes them");
    }
    let mut damaged = None;
    for name in names {
        let started = Instant::now();
        match store.verify(&name) {
            Ok(bytes) => console.line(&format!(
                "{name:<16} ok  {} read in {:.1} s",
                megabytes(bytes),
                started.elapsed().as_secs_f64()
            ))?,
            Err(error) => {
                console.line(&format!("{name:<16} damaged"))?;
                damaged = Some(error);
            }
        }
    }
    damaged.map_or(Ok(Ending::Done), |error| Err(error.into()))
}
