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
//!
//! and an import, `kaa.slice: () -> ()`, which the guest calls when its fuel is below 0. The host
//! then adds fuel to make it >= 0, or traps. Where fuel is charged is in `meter.rs`.
//!
//! A module that this pass cannot rewrite faithfully is refused, never changed in meaning: passive
//! data segments, data at offsets that are not constant, imported, shared or several memories,
//! 64-bit memories and tables. The output is always validated.
//!
//! Sections and function bodies are copied as bytes wherever nothing in them changes.

use std::collections::{HashMap, HashSet};
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};

use thiserror::Error;
use wasm_encoder::reencode::{Error as ReencodeError, Reencode};
use wasm_encoder::{
    CodeSection, ConstExpr, ElementSection, ExportKind, ExportSection, GlobalSection, GlobalType,
    Module, RawSection, SectionId, StartSection, TableSection, ValType,
};
use wasmparser::{
    BinaryReaderError, CompositeInnerType, Data, DataKind, DataSectionReader, ElementItems,
    ElementSectionReader, ExportSectionReader, ExternalKind, FuncToValidate,
    FuncValidatorAllocations, FunctionBody, GlobalSectionReader, KnownCustom, MemoryType, Name,
    NameSectionReader, Operator, Parser, Payload, SectionLimited, TableInit, TableSectionReader,
    TypeRef, ValidPayload, Validator, WasmFeatures,
};

pub use super::meter::Charges;
use super::meter::{self, Surroundings};

/// Module and name of the import that is called when fuel is below 0.
pub const SLICE_IMPORT: (&str, &str) = ("kaa", "slice");
/// The exported fuel global.
pub const FUEL_EXPORT: &str = "kaa:fuel";
/// Prefix of the exported globals; their index follows.
pub const GLOBAL_EXPORT_PREFIX: &str = "kaa:global:";
/// Prefix of the exported functions; their name follows.
pub const FUNCTION_EXPORT_PREFIX: &str = "kaa:fn:";

const WASM_PAGE_BYTES: u64 = 65536;
/// The initial memory is laid out in host memory, so its size must not be for the module to say.
const INITIAL_MEMORY_BYTES_MAX: u64 = 1 << 30;

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
    pub module: Vec<u8>,
    /// The initial memory from address 0: whole Wasm pages; the rest of it is zero.
    pub memory: Vec<u8>,
    /// Size of the memory when the module starts, in Wasm pages.
    pub memory_pages_min: u64,
    pub report: Report,
}

/// Counts for the progress display.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    /// Functions with a body.
    pub functions: u64,
    /// Those of them whose callers pay for them.
    pub functions_free: u64,
    pub charges: Charges,
    pub data_segments: u64,
    pub input_bytes: u64,
    pub output_bytes: u64,
}

/// Why a module was refused. Nothing was written; a different module may do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InstrumentError {
    #[error("the module cannot be read: {0}")]
    Malformed(#[from] BinaryReaderError),
    #[error("the module cannot be read: a branch or `end` at offset {offset} leaves its function")]
    Unbalanced { offset: usize },
    #[error("the module cannot be rewritten: {0}")]
    Reencode(#[source] ReencodeError),
    #[error("the module {0}, which is not supported")]
    Unsupported(&'static str),
    #[error("data segment {index} at address {address} does not fit in the initial memory")]
    DataOutOfBounds { index: usize, address: u64 },
    #[error("the name section names no function {}", .names.join(", "))]
    MissingFunctions { names: Vec<String> },
    #[error("the name section names several functions {name}")]
    AmbiguousFunction { name: String },
    #[error("the module already has an export {name}")]
    ExportExists { name: String },
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
        around = Some(Surroundings { slice, fuel_global, leaf_costs });
    }
    let exported: Vec<_> = options.export_functions.iter().zip(exported).collect();
    let module = input.write(&exported, around.as_ref(), &mut report)?;
    validate(&module)?;
    report.output_bytes = module.len() as u64;
    let memory_pages_min = input.memory.map_or(0, |memory| memory.initial);
    Ok(Instrumented { module, memory, memory_pages_min, report })
}

/// A section whose items are copied as bytes.
#[derive(Clone, Copy, Default)]
struct Raw<'a> {
    count: u32,
    items: &'a [u8],
}

impl<'a> Raw<'a> {
    fn new<T>(wasm: &'a [u8], section: &SectionLimited<'a, T>) -> Self {
        let items = &wasm[section.original_position()..section.range().end];
        Self { count: section.count(), items }
    }

    /// Writes the section with one more item, or as it was.
    fn write(&self, id: SectionId, extra: Option<&[u8]>, module: &mut Module) {
        let mut data = Vec::with_capacity(self.items.len() + 64);
        meter::leb(self.count + u32::from(extra.is_some()), &mut data);
        data.extend_from_slice(self.items);
        data.extend_from_slice(extra.unwrap_or_default());
        if self.count > 0 || extra.is_some() {
            module.section(&RawSection { id: id as u8, data: &data });
        }
    }
}

/// The sections of a module, as far as they matter here.
#[derive(Default)]
struct Input<'a> {
    types: Raw<'a>,
    /// The number of parameters of each type; 0 for those that are not functions.
    params: Vec<u32>,
    imports: Raw<'a>,
    imported_functions: u32,
    imported_globals: u32,
    functions: Raw<'a>,
    /// The type of each function with a body.
    function_types: Vec<u32>,
    tables: Option<TableSectionReader<'a>>,
    memories: Raw<'a>,
    memory: Option<MemoryType>,
    tags: Raw<'a>,
    globals: Option<GlobalSectionReader<'a>>,
    exports: Option<ExportSectionReader<'a>>,
    start: Option<u32>,
    elements: Option<ElementSectionReader<'a>>,
    bodies: Vec<FunctionBody<'a>>,
    data: Option<DataSectionReader<'a>>,
    names: Option<NameSectionReader<'a>>,
}

impl<'a> Input<'a> {
    fn read(wasm: &'a [u8]) -> Result<Self, InstrumentError> {
        let mut input = Self::default();
        for payload in Parser::new(0).parse_all(wasm) {
            match payload? {
                Payload::TypeSection(section) => {
                    input.types = Raw::new(wasm, &section);
                    for group in section {
                        let types = group?.into_types();
                        input.params.extend(types.map(|ty| match ty.composite_type.inner {
                            CompositeInnerType::Func(ty) => ty.params().len() as u32,
                            _ => 0,
                        }));
                    }
                }
                Payload::ImportSection(section) => {
                    input.imports = Raw::new(wasm, &section);
                    for import in section.into_imports() {
                        input.note_import(import?.ty)?;
                    }
                }
                Payload::FunctionSection(section) => {
                    input.functions = Raw::new(wasm, &section);
                    input.function_types = section.into_iter().collect::<Result<_, _>>()?;
                }
                Payload::TableSection(section) => {
                    for table in section.clone() {
                        check_table(table?.ty)?;
                    }
                    input.tables = Some(section);
                }
                Payload::MemorySection(section) => {
                    input.memories = Raw::new(wasm, &section);
                    for memory in section {
                        input.note_memory(memory?)?;
                    }
                }
                Payload::TagSection(section) => input.tags = Raw::new(wasm, &section),
                Payload::GlobalSection(section) => input.globals = Some(section),
                Payload::ExportSection(section) => input.exports = Some(section),
                Payload::StartSection { func, .. } => input.start = Some(func),
                Payload::ElementSection(section) => input.elements = Some(section),
                Payload::CodeSectionEntry(body) => input.bodies.push(body),
                Payload::DataSection(section) => input.data = Some(section),
                Payload::CustomSection(section) => {
                    if let KnownCustom::Name(names) = section.as_known() {
                        input.names = Some(names);
                    }
                }
                // The output has no data segments, so it has no data count either.
                Payload::Version { encoding: wasmparser::Encoding::Module, .. }
                | Payload::DataCountSection { .. }
                | Payload::CodeSectionStart { .. }
                | Payload::End(_) => {}
                _ => return Err(InstrumentError::Unsupported("is a component")),
            }
        }
        if input.bodies.len() != input.function_types.len() {
            return Err(InstrumentError::Unsupported("has functions without bodies"));
        }
        Ok(input)
    }

    fn note_import(&mut self, ty: TypeRef) -> Result<(), InstrumentError> {
        match ty {
            TypeRef::Func(_) | TypeRef::FuncExact(_) => self.imported_functions += 1,
            TypeRef::Global(_) => self.imported_globals += 1,
            TypeRef::Memory(_) => return Err(InstrumentError::Unsupported("imports a memory")),
            TypeRef::Table(table) => check_table(table)?,
            TypeRef::Tag(_) => {}
        }
        Ok(())
    }

    fn note_memory(&mut self, memory: MemoryType) -> Result<(), InstrumentError> {
        let unsupported = if self.memory.is_some() {
            "has several memories"
        } else if memory.memory64 {
            "has a 64-bit memory"
        } else if memory.shared {
            "has a shared memory"
        } else if memory.page_size_log2.is_some() {
            "has a memory with a page size of its own"
        } else {
            self.memory = Some(memory);
            return Ok(());
        };
        Err(InstrumentError::Unsupported(unsupported))
    }

    fn globals_count(&self) -> u32 {
        self.imported_globals + self.globals.as_ref().map_or(0, SectionLimited::count)
    }

    /// Lays the data segments out, in order: later ones may overwrite earlier ones.
    fn initial_memory(&self) -> Result<Vec<u8>, InstrumentError> {
        let mut bytes = Vec::new();
        let size = self.memory.map_or(0, |memory| memory.initial * WASM_PAGE_BYTES);
        for (index, data) in self.data.iter().flat_map(|data| data.clone()).enumerate() {
            let data = data?;
            let address = data_address(&data)?;
            let end = address + data.data.len() as u64;
            if end > size {
                return Err(InstrumentError::DataOutOfBounds { index, address });
            }
            if end > INITIAL_MEMORY_BYTES_MAX {
                return Err(InstrumentError::Unsupported("has more than 1 GiB of initial memory"));
            }
            if bytes.len() < end as usize {
                bytes.resize(end as usize, 0);
            }
            bytes[address as usize..end as usize].copy_from_slice(data.data);
        }
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        bytes.resize(used.next_multiple_of(WASM_PAGE_BYTES as usize), 0);
        Ok(bytes)
    }

    /// The functions that the options name, with their (old) index.
    fn named_functions(&self, names: &[String]) -> Result<Vec<u32>, InstrumentError> {
        let mut found: HashMap<&str, u32> = HashMap::new();
        let wanted: HashSet<&str> = names.iter().map(String::as_str).collect();
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
        let mut expression = |expression: wasmparser::ConstExpr<'_>| {
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
            let fuel = GlobalType { val_type: ValType::I64, mutable: true, shared: false };
            section.global(fuel, &ConstExpr::i64_const(0));
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
        let mut taken = HashSet::new();
        if let Some(exports) = &self.exports {
            for export in exports.clone() {
                taken.insert(export?.name.to_owned());
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
        }
        for (name, kind, index) in added {
            section.export(&name, kind, index);
            if !taken.insert(name.clone()) {
                return Err(InstrumentError::ExportExists { name });
            }
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
            for (body, index) in bodies.iter().zip(first..) {
                let ty = self.function_types[index] as usize;
                let params = self.params.get(ty).copied().unwrap_or(0);
                let leaf = around.leaf_costs[self.imported_functions as usize + index] > 0;
                body_out.clear();
                meter::rewrite(body, params, leaf, around, &mut charges, &mut body_out)?;
                meter::leb(body_out.len() as u32, &mut out);
                out.extend_from_slice(&body_out);
            }
            Ok((out, charges))
        })?;
        let mut items = Vec::with_capacity(parts.iter().map(|(out, _)| out.len()).sum());
        for (out, part) in parts {
            items.extend_from_slice(&out);
            charges.add(&part);
        }
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

/// The address of an active data segment.
fn data_address(data: &Data<'_>) -> Result<u64, InstrumentError> {
    let DataKind::Active { memory_index, offset_expr } = &data.kind else {
        return Err(InstrumentError::Unsupported("has passive data segments"));
    };
    if *memory_index != 0 {
        return Err(InstrumentError::Unsupported("has several memories"));
    }
    let mut operators = offset_expr.get_operators_reader();
    match (operators.read()?, operators.read()?, operators.eof()) {
        (Operator::I32Const { value }, Operator::End, true) => Ok(u64::from(value as u32)),
        _ => Err(InstrumentError::Unsupported("has data at an offset that is not constant")),
    }
}

fn check_table(table: wasmparser::TableType) -> Result<(), InstrumentError> {
    if table.table64 {
        return Err(InstrumentError::Unsupported("has a 64-bit table"));
    }
    Ok(())
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

/// Runs `work` on slices of `items` (with the index of their first item) on all processors, and
/// returns the results in order.
fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(usize, &[T]) -> Result<R, InstrumentError> + Sync,
) -> Result<Vec<R>, InstrumentError> {
    const ITEMS_MIN: usize = 64;
    // Slices of equal count differ in bytes: more of them than threads even that out.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let slice = items.len().div_ceil(threads * 8).max(ITEMS_MIN);
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let first = next.fetch_add(slice, Ordering::Relaxed);
            if first >= items.len() {
                return done;
            }
            let end = items.len().min(first + slice);
            done.push((first, work(first, &items[first..end])));
        }
    };
    let mut results = if items.len() <= slice {
        run()
    } else {
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
            let joined = handles.into_iter().map(|handle| handle.join());
            joined.flat_map(|done| done.unwrap_or_else(|panic| resume_unwind(panic))).collect()
        })
    };
    results.sort_by_key(|(first, _)| *first);
    results.into_iter().map(|(_, result)| result).collect()
}
