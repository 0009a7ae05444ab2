//! The compiled guest: made once per engine configuration, shared by all images.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use wasmtime::{Engine, Module};

use super::engine::{CONFIG_VERSION, Metering};
use super::fetch::{self, megabytes};
use super::instrument::{GLOBAL_EXPORT_PREFIX, Options, instrument};
use super::memory::WASM_PAGE;
use super::pins::pins;
use super::session::{EVAL_FUNCTION, INTERRUPT_FUNCTION};
use super::text;
use crate::error::{Error, Result};
use crate::image::{
    FORMAT, FileRecord, GlobalRecord, Progress, ProgressFn, Store, check_files, key, read_manifest,
    write_json, write_private,
};

/// Bumped when the rewriting of the module changes what comes out of it.
const REWRITE_VERSION: u32 = 5;
const MANIFEST: &str = "module.json";
const ARTIFACT: &str = "python.cwasm";
const MEMORY: &str = "memory.bin";
/// The directory that sessions see as `/usr/local/lib`, and the name that CPython looks for in it.
const STDLIB_DIRECTORY: &str = "lib";
const STDLIB: &str = "lib/python315.zip";

/// What is in a module's directory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ModuleManifest {
    format: u32,
    pub(crate) key: String,
    /// Bytes of the memory that the module starts with.
    pub(crate) memory_bytes: u64,
    /// Its mutable globals, as they are before the guest has run.
    pub(crate) globals: Vec<GlobalRecord>,
    /// Whether memory and globals are all that an instance can change: nothing writes to a table.
    pub(crate) fixed_tables: bool,
    files: Vec<FileRecord>,
}

/// A compiled guest, ready to be instantiated.
pub(crate) struct CompiledGuest {
    pub(crate) manifest: ModuleManifest,
    pub(crate) module: Module,
    directory: PathBuf,
}

impl CompiledGuest {
    /// The directory of the standard library's zip.
    pub(crate) fn stdlib(&self) -> PathBuf {
        self.directory.join(STDLIB_DIRECTORY)
    }

    /// The memory that the module starts with.
    pub(crate) fn memory(&self) -> Result<File> {
        let path = self.directory.join(MEMORY);
        File::open(&path).map_err(|e| Error::io(format!("opening {}", path.display()), e))
    }
}

/// The key of the guest for this engine: a guest, a rewriting and a compiler make one artifact.
pub(crate) fn module_key(engine: &Engine, metering: Metering) -> String {
    let mut hasher = DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    key([
        b"module".as_slice(),
        &FORMAT.to_le_bytes(),
        &REWRITE_VERSION.to_le_bytes(),
        &CONFIG_VERSION.to_le_bytes(),
        metering.suffix().as_bytes(),
        pins().guest.wheel.sha256.as_bytes(),
        &hasher.finish().to_le_bytes(),
    ])
}

/// Loads the compiled guest, if the store has a sound one.
///
/// # Errors
///
/// [`Error::Incompatible`] or [`Error::Io`] when it isn't there or isn't sound; it is made anew then.
pub(crate) fn load(store: &Store, engine: &Engine, metering: Metering) -> Result<CompiledGuest> {
    let wanted = module_key(engine, metering);
    let directory = store.module(&wanted);
    let manifest: ModuleManifest = read_manifest(&directory.join(MANIFEST))?;
    if manifest.format != FORMAT || manifest.key != wanted {
        return Err(Error::Incompatible {
            what: directory.display().to_string(),
            expected: format!("format {FORMAT} and key {wanted}"),
            found: format!("format {} and key {}", manifest.format, manifest.key),
        });
    }
    check_files(&directory, &manifest.files)?;
    let path = directory.join(ARTIFACT);
    #[expect(unsafe_code, reason = "an artifact is native code; wasmtime can't check it")]
    // SAFETY: the file was written by `build` from the output of `Engine::precompile_module`: it has
    // the recorded size, and it and the directories above it belong to this user and are closed to
    // all others (`check_files`, `Store::open`), so that nobody but the user, who could replace this
    // very program, can have put anything else there. Entries are never changed after the rename
    // that published them. A version or configuration that doesn't fit is refused by its header.
    let module =
        unsafe { Module::deserialize_file(engine, &path) }.map_err(|e| Error::Incompatible {
            what: path.display().to_string(),
            expected: "an artifact of this engine".into(),
            found: format!("{e:#}"),
        })?;
    Ok(CompiledGuest { manifest, module, directory })
}

/// Makes the compiled guest and puts it into the store. The store must be locked.
///
/// # Errors
///
/// [`Error::Unavailable`] when the guest can't be had, [`Error::Incompatible`] when it isn't the
/// pinned one.
pub(crate) fn build(
    store: &Store,
    engine: &Engine,
    metering: Metering,
    wheel: Option<&Path>,
    progress: ProgressFn<'_>,
) -> Result<()> {
    let guest = &pins().guest;
    let draft = store.draft()?;
    let at = |name: &str| draft.path().join(name);
    let context = |name: &str| format!("writing {}", draft.path().join(name).display());
    fs::create_dir(at(STDLIB_DIRECTORY)).map_err(|e| Error::io(context(STDLIB_DIRECTORY), e))?;
    let downloads = store.draft()?;
    let wheel = match wheel {
        Some(path) => path.to_owned(),
        None => fetch::download(guest, downloads.path(), progress)?,
    };
    let wasm = fetch::unpack(guest, &wheel, &at(STDLIB), progress)?;
    drop(downloads);

    let started = Instant::now();
    progress(Progress::Begin { step: "instrument", bytes: None });
    let export_functions =
        [INTERRUPT_FUNCTION, EVAL_FUNCTION, text::NEW_FUNCTION, text::SET_ITEM_FUNCTION];
    let export_functions = export_functions.map(str::to_owned).to_vec();
    let options = Options { meter: metering == Metering::Kaa, export_functions };
    let rewritten = instrument(&wasm, &options).map_err(|e| Error::Internal(e.to_string()))?;
    drop(wasm);
    let detail = format!("{} of WebAssembly", megabytes(rewritten.module.len() as u64));
    progress(Progress::End { detail, elapsed: started.elapsed() });

    let started = Instant::now();
    progress(Progress::Begin { step: "compile", bytes: None });
    let artifact = engine
        .precompile_module(&rewritten.module)
        .map_err(|e| Error::Internal(format!("compiling the guest: {e:#}")))?;
    let detail = format!("{} of machine code", megabytes(artifact.len() as u64));
    progress(Progress::End { detail, elapsed: started.elapsed() });

    write_private(&at(ARTIFACT), &artifact).map_err(|e| Error::io(context(ARTIFACT), e))?;
    drop(artifact);
    let memory_bytes = (rewritten.memory_pages_min as usize * WASM_PAGE)
        .max(rewritten.memory.len().next_multiple_of(WASM_PAGE));
    write_private(&at(MEMORY), &rewritten.memory)
        .and_then(|()| File::options().write(true).open(at(MEMORY))?.set_len(memory_bytes as u64))
        .map_err(|e| Error::io(context(MEMORY), e))?;
    let files = [ARTIFACT, MEMORY, STDLIB]
        .iter()
        .map(|name| FileRecord::of(draft.path(), name))
        .collect::<Result<Vec<_>>>()?;
    let key = module_key(engine, metering);
    let manifest = ModuleManifest {
        format: FORMAT,
        key: key.clone(),
        memory_bytes: memory_bytes as u64,
        globals: initial_globals(&rewritten.module)?,
        fixed_tables: !writes_tables(&rewritten.module)?,
        files,
    };
    write_json(&at(MANIFEST), &manifest)?;
    store.publish(draft, &store.module(&key))
}

/// The mutable globals of a rewritten module with the values that it gives them.
fn initial_globals(module: &[u8]) -> Result<Vec<GlobalRecord>> {
    let parse = || -> Result<Vec<GlobalRecord>, wasmparser::BinaryReaderError> {
        let mut values = Vec::new();
        let mut records = Vec::new();
        for payload in wasmparser::Parser::new(0).parse_all(module) {
            match payload? {
                wasmparser::Payload::GlobalSection(section) => {
                    for global in section {
                        let global = global?;
                        let init = global.init_expr.get_operators_reader().read()?;
                        values.push((global.ty, constant(&init)));
                    }
                }
                wasmparser::Payload::ExportSection(section) => {
                    for export in section {
                        let export = export?;
                        if let Some((ty, Some((name, bits)))) = values.get(export.index as usize)
                            && export.name.starts_with(GLOBAL_EXPORT_PREFIX)
                            && ty.mutable
                        {
                            records.push(GlobalRecord {
                                export: export.name.to_owned(),
                                type_name: (*name).to_owned(),
                                bits: *bits,
                            });
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(records)
    };
    parse().map_err(|e| Error::Internal(format!("reading the rewritten module: {e}")))
}

/// Whether any function of a module has an operator that changes a table.
fn writes_tables(module: &[u8]) -> Result<bool> {
    use wasmparser::Operator::{TableCopy, TableFill, TableGrow, TableInit, TableSet};

    let parse = || -> Result<bool, wasmparser::BinaryReaderError> {
        for payload in wasmparser::Parser::new(0).parse_all(module) {
            let wasmparser::Payload::CodeSectionEntry(body) = payload? else { continue };
            let mut operators = body.get_operators_reader()?;
            while !operators.eof() {
                let writes = matches!(
                    operators.read()?,
                    TableSet { .. }
                        | TableFill { .. }
                        | TableCopy { .. }
                        | TableInit { .. }
                        | TableGrow { .. }
                );
                if writes {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    };
    parse().map_err(|e| Error::Internal(format!("reading the rewritten module: {e}")))
}

fn constant(operator: &wasmparser::Operator<'_>) -> Option<(&'static str, u64)> {
    match operator {
        wasmparser::Operator::I32Const { value } => Some(("i32", u64::from(*value as u32))),
        wasmparser::Operator::I64Const { value } => Some(("i64", *value as u64)),
        wasmparser::Operator::F32Const { value } => Some(("f32", u64::from(value.bits()))),
        wasmparser::Operator::F64Const { value } => Some(("f64", value.bits())),
        _ => None,
    }
}
