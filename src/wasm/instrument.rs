//! Rewrites a guest module so that the runtime can meter, snapshot and interrupt it.
//!
//! One pass over the binary. What it takes out: custom sections, and the active data segments,
//! which become the bytes of the initial memory. Code and memory are then separate: one compiled
//! artifact serves every image. What it puts in:
//!
//! | export | what |
//! |---|---|
//! | `kaa:global:N` | the module's global N, so that memory + globals are the whole state |
//! | `kaa:fn:NAME` | a function found by its name in the name section |
//! | `kaa:fuel` | the fuel left, a mutable i64; it starts at 0, so the host must set it |
//! | `kaa:floor` | what fuel must not go below, a mutable i64; the host may raise it |
//!
//! and an import, `kaa.slice: () -> ()`, which the guest calls when its fuel is below 0. The host
//! then adds fuel to make it >= 0, or traps. Where fuel is charged, and where a guest runs into
//! overdraft down to the floor and traps there (`unreachable`), is in `meter.rs`.
//!
//! A custom section (`metadata.code.branch_hint`) tells the engine that these checks hardly ever
//! fire. It needs `Config::wasm_branch_hinting`; without that it is only slower.
//!
//! A module that this pass cannot rewrite faithfully is refused, never changed in meaning: passive
//! data segments, data at offsets that are not constant, imported, shared or several memories,
//! 64-bit memories and tables, exports whose names begin like those above. The output is always validated.
//!
//! Sections and function bodies are copied as bytes wherever nothing in them changes.

use std::collections::{HashMap, HashSet};

use thiserror::Error;
use wasm_encoder::reencode::{Error as ReencodeError, Reencode};
use wasm_encoder::{
    BranchHint, BranchHints, CodeSection, ConstExpr, ElementSection, ExportKind, ExportSection,
    GlobalSection, GlobalType, Module, SectionId, StartSection, TableSection, ValType,
};
use wasmparser::{
    BinaryReaderError, ConstExpr as InputExpr, ElementItems, ExternalKind, FuncToValidate,
    FuncValidatorAllocations, Name, Operator, Parser, TableInit, ValidPayload, Validator,
    WasmFeatures,
};

mod input;
mod parallel;

use input::{Input, Raw};
use parallel::in_parallel;

pub use super::meter::Charges;
use super::meter::{self, Surroundings};

/// Module and name of the import that is called when fuel is below 0.
pub const SLICE_IMPORT: (&str, &str) = ("kaa", "slice");
/// How the names of all added exports begin. A module that has such an export is refused.
pub const EXPORT_PREFIX: &str = "kaa:";
/// The exported fuel global.
pub const FUEL_EXPORT: &str = "kaa:fuel";
/// The exported global that fuel must not go below.
pub const FLOOR_EXPORT: &str = "kaa:floor";
/// Prefix of the exported globals; their index follows.
pub const GLOBAL_EXPORT_PREFIX: &str = "kaa:global:";
/// Prefix of the exported functions; their name follows.
pub const FUNCTION_EXPORT_PREFIX: &str = "kaa:fn:";

/// What the output may use. Proposals with control flow that `meter` does not know (legacy
/// exceptions, stack switching) must stay out: this is what refuses them.
const FEATURES: WasmFeatures =
    WasmFeatures::WASM3.difference(WasmFeatures::MEMORY64).difference(WasmFeatures::MULTI_MEMORY);

/// What to put in.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Charge fuel.
    pub meter: bool,
    /// Functions to export, by their names in the name section.
    pub export_functions: Vec<String>,
}

/// The rewritten module and what was taken out of it.
#[derive(Debug, Clone)]
pub struct Instrumented {
    /// The module, validated.
    pub module: Vec<u8>,
    /// The initial memory from address 0: whole Wasm pages; the rest of it is zero.
    pub memory: Vec<u8>,
    /// Size of the memory when the module starts, in Wasm pages.
    pub memory_pages_min: u64,
    /// What was done.
    pub report: Report,
}

/// Counts for the progress display.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Functions with a body.
    pub functions: u64,
    /// Those of them whose callers pay for them.
    pub functions_free: u64,
    /// Where fuel is charged.
    pub charges: Charges,
    /// Segments that were laid out into the initial memory.
    pub data_segments: u64,
    /// Size of the module as it was.
    pub input_bytes: u64,
    /// Size of the module as it is.
    pub output_bytes: u64,
}

/// Why a module was refused. Nothing was written; a different module may do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InstrumentError {
    /// Not a module, or a damaged one.
    #[error("the module cannot be read: {0}")]
    Malformed(#[from] BinaryReaderError),
    /// Blocks and branches do not fit together.
    #[error(
        "the module cannot be read: a branch or `end` at offset {offset} of a function leaves it"
    )]
    Unbalanced {
        /// Where, from the start of the function.
        offset: usize,
    },
    /// A section cannot be encoded again.
    #[error("the module cannot be rewritten: {0}")]
    Reencode(#[source] ReencodeError),
    /// It cannot be rewritten faithfully.
    #[error("the module {0}, which is not supported")]
    Unsupported(&'static str),
    /// Instantiating the module would trap.
    #[error("data segment {index} at address {address} does not fit in the initial memory")]
    DataOutOfBounds {
        /// Which segment.
        index: usize,
        /// Where it starts.
        address: u64,
    },
    /// Functions to export were not found.
    #[error("the name section names no function {}", .names.join(", "))]
    MissingFunctions {
        /// All of them.
        names: Vec<String>,
    },
    /// A function to export was found more than once.
    #[error("the name section names several functions {name}")]
    AmbiguousFunction {
        /// Its name.
        name: String,
    },
    /// The module has an export whose name only this pass may give.
    #[error("the module exports {name:?}: names from {EXPORT_PREFIX} on are for what is added")]
    ExportReserved {
        /// Its name.
        name: String,
    },
    /// A function to export was given more than once.
    #[error("function {name} is to be exported twice")]
    ExportedTwice {
        /// Its name.
        name: String,
    },
    /// The input was not valid, or uses what is not supported.
    #[error("the rewritten module is not valid: {0}")]
    Invalid(#[source] BinaryReaderError),
}

impl From<ReencodeError> for InstrumentError {
    fn from(error: ReencodeError) -> Self {
        match error {
            ReencodeError::ParseError(error) => Self::Malformed(error),
            error => Self::Reencode(error),
        }
    }
}

/// Rewrites a module.
///
/// # Errors
///
/// [`InstrumentError`], when the module is damaged or cannot be rewritten faithfully.
pub fn instrument(wasm: &[u8], options: &Options) -> Result<Instrumented, InstrumentError> {
    let input = Input::read(wasm)?;
    let memory = input.initial_memory()?;
    if input.start.is_some() && !memory.is_empty() {
        // It would run before the host has laid the memory out.
        return Err(InstrumentError::Unsupported("has a start function and data segments"));
    }
    let exported = input.named_functions(&options.export_functions)?;
    let mut report = Report {
        functions: input.bodies.len() as u64,
        data_segments: input.data.as_ref().map_or(0, |data| u64::from(data.count())),
        input_bytes: wasm.len() as u64,
        ..Report::default()
    };
    let mut around = None;
    if options.meter {
        let leaf_costs = leaf_costs(&input, &exported)?;
        report.functions_free = leaf_costs.iter().filter(|cost| **cost > 0).count() as u64;
        let (slice, fuel_global) = (input.imported_functions, input.globals_count());
        let floor_global = fuel_global + 1;
        around = Some(Surroundings { slice, fuel_global, floor_global, leaf_costs });
    }
    let exported: Vec<_> = options.export_functions.iter().zip(exported).collect();
    let module = input.write(&exported, around.as_ref(), &mut report)?;
    validate(&module)?;
    report.output_bytes = module.len() as u64;
    let memory_pages_min = input.memory.map_or(0, |memory| memory.initial);
    Ok(Instrumented { module, memory, memory_pages_min, report })
}

impl Input<'_> {
    /// The functions that the options name, with their (old) index.
    fn named_functions(&self, names: &[String]) -> Result<Vec<u32>, InstrumentError> {
        let mut found: HashMap<&str, u32> = HashMap::new();
        let mut wanted = HashSet::new();
        if let Some(name) = names.iter().find(|name| !wanted.insert(name.as_str())) {
            return Err(InstrumentError::ExportedTwice { name: name.clone() });
        }
        for subsection in self.names.clone().into_iter().flatten() {
            let Name::Function(map) = subsection? else { continue };
            for naming in map {
                let naming = naming?;
                if wanted.contains(naming.name) && found.insert(naming.name, naming.index).is_some()
                {
                    let name = naming.name.to_owned();
                    return Err(InstrumentError::AmbiguousFunction { name });
                }
            }
        }
        let missing = |name: &&String| !found.contains_key(name.as_str());
        let missing: Vec<_> = names.iter().filter(missing).cloned().collect();
        if !missing.is_empty() {
            return Err(InstrumentError::MissingFunctions { names: missing });
        }
        Ok(names.iter().map(|name| found[name.as_str()]).collect())
    }

    /// Calls `take` with each function whose address the module's tables or globals hold.
    fn address_taken(&self, mut take: impl FnMut(u32)) -> Result<(), InstrumentError> {
        let mut expression = |expression: InputExpr<'_>| {
            for operator in expression.get_operators_reader() {
                if let Operator::RefFunc { function_index } = operator? {
                    take(function_index);
                }
            }
            Ok::<_, InstrumentError>(())
        };
        for global in self.globals.iter().flat_map(|globals| globals.clone()) {
            expression(global?.init_expr)?;
        }
        for table in self.tables.iter().flat_map(|tables| tables.clone()) {
            if let TableInit::Expr(init) = table?.init {
                expression(init)?;
            }
        }
        for element in self.elements.iter().flat_map(|elements| elements.clone()) {
            if let ElementItems::Expressions(_, items) = element?.items {
                for item in items {
                    expression(item?)?;
                }
            }
        }
        for element in self.elements.iter().flat_map(|elements| elements.clone()) {
            if let ElementItems::Functions(items) = element?.items {
                for item in items {
                    take(item?);
                }
            }
        }
        Ok(())
    }

    fn write(
        &self,
        exported: &[(&String, u32)],
        around: Option<&Surroundings>,
        report: &mut Report,
    ) -> Result<Vec<u8>, InstrumentError> {
        let mut renumber = Renumber(around);
        let mut module = Module::new();
        let slice_type = self.params.len() as u32;
        self.types.write(SectionId::Type, around.map(|_| &[0x60, 0, 0][..]), &mut module);
        let slice = around.map(|_| slice_import(slice_type));
        self.imports.write(SectionId::Import, slice.as_deref(), &mut module);
        self.functions.write(SectionId::Function, None, &mut module);
        if let Some(tables) = &self.tables {
            let mut section = TableSection::new();
            renumber.parse_table_section(&mut section, tables.clone())?;
            module.section(&section);
        }
        self.memories.write(SectionId::Memory, None, &mut module);
        self.tags.write(SectionId::Tag, None, &mut module);
        self.write_globals(&mut renumber, &mut module)?;
        self.write_exports(&mut renumber, exported, &mut module)?;
        if let Some(start) = self.start {
            module.section(&StartSection { function_index: renumber.function_index(start)? });
        }
        if let Some(elements) = &self.elements {
            let mut section = ElementSection::new();
            renumber.parse_element_section(&mut section, elements.clone())?;
            module.section(&section);
        }
        self.write_code(around, &mut report.charges, &mut module)?;
        Ok(module.finish())
    }

    fn write_globals(
        &self,
        renumber: &mut Renumber<'_>,
        module: &mut Module,
    ) -> Result<(), InstrumentError> {
        let mut section = GlobalSection::new();
        if let Some(globals) = &self.globals {
            renumber.parse_global_section(&mut section, globals.clone())?;
        }
        if renumber.0.is_some() {
            let ty = GlobalType { val_type: ValType::I64, mutable: true, shared: false };
            section.global(ty, &ConstExpr::i64_const(0));
            section.global(ty, &ConstExpr::i64_const(meter::FLOOR_DEFAULT));
        }
        if !section.is_empty() {
            module.section(&section);
        }
        Ok(())
    }

    fn write_exports(
        &self,
        renumber: &mut Renumber<'_>,
        exported: &[(&String, u32)],
        module: &mut Module,
    ) -> Result<(), InstrumentError> {
        let mut section = ExportSection::new();
        if let Some(exports) = &self.exports {
            for export in exports.clone() {
                let name = export?.name;
                if name.starts_with(EXPORT_PREFIX) {
                    return Err(InstrumentError::ExportReserved { name: name.to_owned() });
                }
            }
            renumber.parse_export_section(&mut section, exports.clone())?;
        }
        let mut added = Vec::new();
        for global in 0..self.globals_count() {
            added.push((format!("{GLOBAL_EXPORT_PREFIX}{global}"), ExportKind::Global, global));
        }
        for (name, function) in exported {
            let function = renumber.function_index(*function)?;
            added.push((format!("{FUNCTION_EXPORT_PREFIX}{name}"), ExportKind::Func, function));
        }
        if let Some(around) = renumber.0 {
            added.push((FUEL_EXPORT.to_owned(), ExportKind::Global, around.fuel_global));
            added.push((FLOOR_EXPORT.to_owned(), ExportKind::Global, around.floor_global));
        }
        for (name, kind, index) in added {
            section.export(&name, kind, index);
        }
        if !section.is_empty() {
            module.section(&section);
        }
        Ok(())
    }

    fn write_code(
        &self,
        around: Option<&Surroundings>,
        charges: &mut Charges,
        module: &mut Module,
    ) -> Result<(), InstrumentError> {
        let Some(around) = around else {
            let mut section = CodeSection::new();
            for body in &self.bodies {
                section.raw(body.as_bytes());
            }
            if !section.is_empty() {
                module.section(&section);
            }
            return Ok(());
        };
        let parts = in_parallel(&self.bodies, |first, bodies| {
            let mut out = Vec::new();
            let mut charges = Charges::default();
            let mut body_out = Vec::new();
            let mut hints = Vec::new();
            for (body, index) in bodies.iter().zip(first..) {
                let ty = self.function_types[index] as usize;
                let params = self.params.get(ty).copied().unwrap_or(0);
                let leaf = around.leaf_costs[self.imported_functions as usize + index] > 0;
                body_out.clear();
                let unlikely =
                    meter::rewrite(body, params, leaf, around, &mut charges, &mut body_out)?;
                if !unlikely.is_empty() {
                    hints.push((around.renumber(self.imported_functions + index as u32), unlikely));
                }
                meter::leb(body_out.len() as u32, &mut out);
                out.extend_from_slice(&body_out);
            }
            Ok((out, charges, hints))
        })?;
        let mut items = Vec::with_capacity(parts.iter().map(|(out, _, _)| out.len()).sum());
        let mut hints = BranchHints::new();
        for (out, part, unlikely) in parts {
            items.extend_from_slice(&out);
            charges.add(&part);
            for (function, offsets) in unlikely {
                let hint =
                    |branch_func_offset| BranchHint { branch_func_offset, branch_hint_value: 0 };
                hints.function_hints(function, offsets.into_iter().map(hint));
            }
        }
        module.section(&hints);
        let count = self.bodies.len() as u32;
        Raw { count, items: &items }.write(SectionId::Code, None, module);
        Ok(())
    }
}

/// Which functions the callers pay for.
fn leaf_costs(input: &Input<'_>, exported: &[u32]) -> Result<Vec<u32>, InstrumentError> {
    let surveys = in_parallel(&input.bodies, |_, bodies| {
        bodies.iter().map(meter::survey).collect::<Result<Vec<_>, _>>()
    })?;
    let surveys: Vec<_> = surveys.into_iter().flatten().collect();
    let mut limits =
        vec![meter::LEAF_DIRECT_MAX; input.imported_functions as usize + surveys.len()];
    let mut limit = |function: u32, max: u64| {
        // Out of range only in a module that is not valid, which is found later.
        if let Some(limit) = limits.get_mut(function as usize) {
            *limit = max.min(*limit);
        }
    };
    for function in surveys.iter().flat_map(|survey| &survey.refs) {
        limit(*function, meter::LEAF_INDIRECT_MAX);
    }
    input.address_taken(|function| limit(function, meter::LEAF_INDIRECT_MAX))?;
    for export in input.exports.iter().flat_map(|exports| exports.clone()) {
        let export = export?;
        if matches!(export.kind, ExternalKind::Func | ExternalKind::FuncExact) {
            limit(export.index, 0);
        }
    }
    for function in exported.iter().chain(&input.start) {
        limit(*function, 0);
    }
    let mut costs = vec![0; limits.len()];
    let defined = costs[input.imported_functions as usize..].iter_mut();
    let limits = &limits[input.imported_functions as usize..];
    for ((cost, survey), limit) in defined.zip(&surveys).zip(limits) {
        *cost = survey.bounded_cost.filter(|cost| cost <= limit).unwrap_or(0) as u32;
    }
    Ok(costs)
}

fn slice_import(ty: u32) -> Vec<u8> {
    const FUNCTION: u8 = 0;
    let mut item = Vec::new();
    for name in [SLICE_IMPORT.0, SLICE_IMPORT.1] {
        meter::leb(name.len() as u32, &mut item);
        item.extend_from_slice(name.as_bytes());
    }
    item.push(FUNCTION);
    meter::leb(ty, &mut item);
    item
}

/// Moves function indices up where the new import goes.
struct Renumber<'a>(Option<&'a Surroundings>);

impl Reencode for Renumber<'_> {
    type Error = std::convert::Infallible;

    fn function_index(&mut self, function: u32) -> Result<u32, ReencodeError> {
        Ok(self.0.map_or(function, |around| around.renumber(function)))
    }
}

/// Validates the output, function bodies in parallel.
fn validate(module: &[u8]) -> Result<(), InstrumentError> {
    let mut validator = Validator::new_with_features(FEATURES);
    let mut bodies = Vec::new();
    for payload in Parser::new(0).parse_all(module) {
        let payload = payload.map_err(InstrumentError::Invalid)?;
        let valid = validator.payload(&payload).map_err(InstrumentError::Invalid)?;
        if let ValidPayload::Func(function, body) = valid {
            bodies.push((function, body));
        }
    }
    in_parallel(&bodies, |_, bodies| {
        let mut allocations = FuncValidatorAllocations::default();
        for (function, body) in bodies {
            let function = FuncToValidate { resources: function.resources.clone(), ..*function };
            let mut validator = function.into_validator(allocations);
            validator.validate(body).map_err(InstrumentError::Invalid)?;
            allocations = validator.into_allocations();
        }
        Ok(())
    })?;
    Ok(())
}
