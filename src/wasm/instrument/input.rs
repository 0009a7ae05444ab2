//! What the rewriting needs to know about the sections of a module.

use wasm_encoder::{Module, RawSection, SectionId};
use wasmparser::{
    CompositeInnerType, Data, DataKind, DataSectionReader, ElementSectionReader, Encoding,
    ExportSectionReader, FunctionBody, GlobalSectionReader, KnownCustom, MemoryType,
    NameSectionReader, Operator, Parser, Payload, SectionLimited, TableSectionReader, TableType,
    TypeRef,
};

use super::InstrumentError;
use crate::wasm::meter;

const WASM_PAGE_BYTES: u64 = 65536;
/// The initial memory is laid out in host memory, so its size must not be for the module to say.
const INITIAL_MEMORY_BYTES_MAX: u64 = 1 << 30;

/// A section whose items are copied as bytes.
#[derive(Clone, Copy, Default)]
pub(super) struct Raw<'a> {
    pub(super) count: u32,
    pub(super) items: &'a [u8],
}

impl<'a> Raw<'a> {
    pub(super) fn new<T>(wasm: &'a [u8], section: &SectionLimited<'a, T>) -> Self {
        let items = &wasm[section.original_position()..section.range().end];
        Self { count: section.count(), items }
    }

    /// Writes the section with one more item, or as it was.
    pub(super) fn write(&self, id: SectionId, extra: Option<&[u8]>, module: &mut Module) {
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
pub(super) struct Input<'a> {
    pub(super) types: Raw<'a>,
    /// The number of parameters of each type; 0 for those that are not functions.
    pub(super) params: Vec<u32>,
    pub(super) imports: Raw<'a>,
    pub(super) imported_functions: u32,
    pub(super) imported_globals: u32,
    pub(super) functions: Raw<'a>,
    /// The type of each function with a body.
    pub(super) function_types: Vec<u32>,
    pub(super) tables: Option<TableSectionReader<'a>>,
    pub(super) memories: Raw<'a>,
    pub(super) memory: Option<MemoryType>,
    pub(super) tags: Raw<'a>,
    pub(super) globals: Option<GlobalSectionReader<'a>>,
    pub(super) exports: Option<ExportSectionReader<'a>>,
    pub(super) start: Option<u32>,
    pub(super) elements: Option<ElementSectionReader<'a>>,
    pub(super) bodies: Vec<FunctionBody<'a>>,
    pub(super) data: Option<DataSectionReader<'a>>,
    pub(super) names: Option<NameSectionReader<'a>>,
}

impl<'a> Input<'a> {
    pub(super) fn read(wasm: &'a [u8]) -> Result<Self, InstrumentError> {
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
                Payload::Version { encoding: Encoding::Module, .. }
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

    pub(super) fn note_import(&mut self, ty: TypeRef) -> Result<(), InstrumentError> {
        match ty {
            TypeRef::Func(_) | TypeRef::FuncExact(_) => self.imported_functions += 1,
            TypeRef::Global(_) => self.imported_globals += 1,
            TypeRef::Memory(_) => return Err(InstrumentError::Unsupported("imports a memory")),
            TypeRef::Table(table) => check_table(table)?,
            TypeRef::Tag(_) => {}
        }
        Ok(())
    }

    pub(super) fn note_memory(&mut self, memory: MemoryType) -> Result<(), InstrumentError> {
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

    pub(super) fn globals_count(&self) -> u32 {
        self.imported_globals + self.globals.as_ref().map_or(0, SectionLimited::count)
    }

    /// Lays the data segments out, in order: later ones may overwrite earlier ones.
    pub(super) fn initial_memory(&self) -> Result<Vec<u8>, InstrumentError> {
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

fn check_table(table: TableType) -> Result<(), InstrumentError> {
    if table.table64 {
        return Err(InstrumentError::Unsupported("has a 64-bit table"));
    }
    Ok(())
}
