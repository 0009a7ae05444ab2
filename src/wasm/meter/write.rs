//! The operators that the fuel pass puts into a body, in binary.

use wasmparser::FunctionBody;

use super::Surroundings;
use crate::wasm::instrument::InstrumentError;

const CALL_OPCODE: u8 = 0x10;
const END: u8 = 0x0b;
const GLOBAL_GET: u8 = 0x23;
const GLOBAL_SET: u8 = 0x24;
const I32: u8 = 0x7f;
pub(super) const I64_ADD: u8 = 0x7c;
const I64_CONST: u8 = 0x42;
const I64_EXTEND_I32_U: u8 = 0xad;
const I64_LT_S: u8 = 0x53;
const I64_SHL: u8 = 0x86;
pub(super) const I64_SUB: u8 = 0x7d;
const IF_VOID: [u8; 2] = [0x04, 0x40];
const LOCAL_GET: u8 = 0x20;
const LOCAL_TEE: u8 = 0x22;
const UNREACHABLE: u8 = 0x00;

/// Copies the declarations of locals. If there are bulk operators, appends an i32 for their size
/// operand and returns its index.
pub(super) fn write_locals(
    body: &FunctionBody<'_>,
    params: u32,
    has_bulk: bool,
    out: &mut Vec<u8>,
) -> Result<u32, InstrumentError> {
    let locals = body.get_locals_reader()?;
    let base = body.range().start;
    let groups_at = locals.original_position() - base;
    let groups = locals.get_count();
    let end = body.get_operators_reader()?.original_position() - base;
    let bytes = body.as_bytes();
    if !has_bulk {
        out.extend_from_slice(&bytes[..end]);
        return Ok(0);
    }
    let mut scratch = params;
    for group in locals {
        // Cannot overflow: the reader refuses more than 50,000 locals.
        scratch += group?.0;
    }
    leb(groups + 1, out);
    out.extend_from_slice(&bytes[groups_at..end]);
    out.extend_from_slice(&[1, I32]);
    Ok(scratch)
}

/// Writes the operators that are put in.
pub(super) struct Writer<'a> {
    pub(super) around: &'a Surroundings,
    pub(super) scratch: u32,
    /// Offsets in `out` of branches that are hardly ever taken.
    pub(super) unlikely: Vec<u32>,
    pub(super) out: &'a mut Vec<u8>,
}

impl Writer<'_> {
    /// `fuel = fuel - units`, or `+`
    pub(super) fn change_fuel(&mut self, units: u64, operator: u8) {
        let fuel = self.around.fuel_global;
        self.with_index(GLOBAL_GET, fuel);
        self.out.push(I64_CONST);
        leb_signed(units as i64, self.out);
        self.out.push(operator);
        self.with_index(GLOBAL_SET, fuel);
    }

    /// `if fuel < 0 { slice() }`
    pub(super) fn soft_check(&mut self) {
        self.with_index(GLOBAL_GET, self.around.fuel_global);
        self.out.extend_from_slice(&[I64_CONST, 0]);
        self.if_less();
        self.with_index(CALL_OPCODE, self.around.slice);
        self.out.push(END);
    }

    /// `if fuel < floor { unreachable }`
    pub(super) fn hard_check(&mut self) {
        self.with_index(GLOBAL_GET, self.around.fuel_global);
        self.with_index(GLOBAL_GET, self.around.floor_global);
        self.if_less();
        self.out.extend_from_slice(&[UNREACHABLE, END]);
    }

    /// `fuel = fuel - (extend_unsigned(size) << bytes_log2)`, with the size operand on top of the
    /// stack, and a check. Of its 32 bits none comes near the sign.
    pub(super) fn bulk_charge(&mut self, bytes_log2: u8) {
        self.with_index(LOCAL_TEE, self.scratch);
        self.with_index(GLOBAL_GET, self.around.fuel_global);
        self.with_index(LOCAL_GET, self.scratch);
        self.out.extend_from_slice(&[I64_EXTEND_I32_U, I64_CONST, bytes_log2, I64_SHL, I64_SUB]);
        self.with_index(GLOBAL_SET, self.around.fuel_global);
        self.soft_check();
    }

    fn if_less(&mut self) {
        self.out.push(I64_LT_S);
        self.unlikely.push(self.out.len() as u32);
        self.out.extend_from_slice(&IF_VOID);
    }

    fn with_index(&mut self, opcode: u8, index: u32) {
        self.out.push(opcode);
        leb(index, self.out);
    }
}

/// Appends an unsigned LEB128 number.
pub(in crate::wasm) fn leb(mut value: u32, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn leb_signed(mut value: i64, out: &mut Vec<u8>) {
    loop {
        let byte = value as u8 & 0x7f;
        value >>= 7;
        let sign = byte & 0x40 != 0;
        if (value == 0 && !sign) || (value == -1 && sign) {
            out.push(byte);
            return;
        }
        out.push(byte | 0x80);
    }
}
