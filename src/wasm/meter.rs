//! The fuel pass over one function body: where fuel is charged, and how much.
//!
//! # The rule
//!
//! A *unit* of fuel is one operator; [`weight`] gives operators that cost more than that more, and
//! the purely syntactic ones nothing. The *work* of an execution is the sum of the weights of the
//! operators that it executed, plus one for each function entered and each loop header passed,
//! plus the size charges of bulk operators.
//!
//! Fuel is paid before the work, by paths. For each point of a function the pass computes its
//! *prepayment*: what is already paid for when control arrives there. It is found in one walk
//! backwards, because in structured code the target of a forward branch comes later:
//!
//! - at the end of the function, and after an operator that leaves it, the prepayment is 0;
//! - before a straight line of operators it is their weight plus the prepayment after them;
//! - before a loop it is 0, and at the loop header, once per iteration, the prepayment of the body
//!   plus one is charged; function entry likewise;
//! - where control parts (`if`, `br_if`, …) the two prepayments may differ. If by at most
//!   [`SLACK`], the larger one is used and nothing is charged: the cheaper path pays up to `SLACK`
//!   too much. If by more, the difference is charged where the costlier path starts, or given back
//!   where a cheaper one starts, and both paths pay exactly;
//! - at a label that a `br_table` names the prepayment is at most `SLACK`; what is more is charged
//!   behind the label, so each arm of a `switch` pays for itself;
//! - at a label that a `try_table` catches into it is 0, as an exception brings nothing along.
//!
//! It follows that at any moment, for the operators executed so far,
//!
//! ```text
//! work <= fuel charged <= work + SLACK * branches taken or passed + prepayments lost
//! ```
//!
//! where a prepayment is lost only to a trap or an exception, at most one per frame left by it.
//! Each charge checks that fuel is still >= 0, and calls the host if not, before any of the work
//! that it pays for: a guest whose host does not refill never works more than its budget.
//! `tests/metering.rs` holds this against wasmtime's own count.
//!
//! Bulk operators charge their size operand in the same way, before they run.
//!
//! # Functions without charges
//!
//! A function without loops, calls, bulk operators and exceptions does a bounded amount of work:
//! its costliest path. If that is small, the function stays as it is and its callers pay: direct
//! calls exactly that, indirect calls a flat [`CALL_INDIRECT`] that covers every such function
//! whose address is taken ([`LEAF_INDIRECT_MAX`]). Exported functions always charge.

use wasmparser::{Catch, FunctionBody, Operator};

use super::instrument::InstrumentError;

/// How much a path may pay too much at a place where control parts, instead of a charge of its
/// own. Charges cost time, so this trades exactness for speed.
const SLACK: u64 = 24;
/// The costliest path of a function that its direct callers pay for.
pub(super) const LEAF_DIRECT_MAX: u64 = 64;
/// The same for functions whose address is taken: any indirect call may reach one.
pub(super) const LEAF_INDIRECT_MAX: u64 = 12;
/// The flat weight of a direct call: the frame, the register saves, the stack check.
const CALL: u64 = 2;
/// The weight of an indirect call: the table and signature checks, and a leaf that it may reach.
const CALL_INDIRECT: u64 = 4 + LEAF_INDIRECT_MAX;
/// Unwinding searches tables frame by frame in the host: microseconds, not an operator.
const THROW: u64 = 1000;
/// Growing changes page protections: a system call at least.
const GROW: u64 = 1000;

/// Bulk charges are one unit per 16 bytes: log2 of that, and of the bytes of each element.
const BYTES_PER_UNIT_LOG2: u32 = 4;
const PAGE_BYTES_LOG2: u32 = 16;
const TABLE_ELEMENT_BYTES_LOG2: u32 = 3;

/// What the pass over one function needs to know about the rest of the module.
pub(super) struct Surroundings {
    /// Functions from this index on have moved up by one to make room for `slice`.
    pub slice: u32,
    pub fuel_global: u32,
    /// The static cost of each function (by old index) that its callers pay for; 0 for others.
    pub leaf_costs: Vec<u32>,
}

impl Surroundings {
    pub(super) fn renumber(&self, function: u32) -> u32 {
        function + u32::from(function >= self.slice)
    }
}

/// What a first look at a function body tells.
pub(super) struct Survey {
    /// The costliest path, if the function does a bounded amount of work.
    pub bounded_cost: Option<u64>,
    /// Functions whose address it takes.
    pub refs: Vec<u32>,
}

/// How many charges of each kind the pass has put in.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Charges {
    pub functions: u64,
    pub loops: u64,
    /// Where paths part or meet inside a function.
    pub branches: u64,
    /// Given back where a cheaper path starts.
    pub refunds: u64,
    pub bulk_operators: u64,
}

impl Charges {
    pub(super) fn add(&mut self, other: &Self) {
        self.functions += other.functions;
        self.loops += other.loops;
        self.branches += other.branches;
        self.refunds += other.refunds;
        self.bulk_operators += other.bulk_operators;
    }
}

/// Looks at a function body without changing it.
pub(super) fn survey(body: &FunctionBody<'_>) -> Result<Survey, InstrumentError> {
    let mut flow = Flow::read(body, |_| 0)?;
    let bounded_cost = flow.bounded.then(|| {
        let mut unused = Vec::new();
        flow.prepay(u64::MAX, &mut unused, &mut Charges::default()) + 1
    });
    Ok(Survey { bounded_cost, refs: flow.refs })
}

/// Writes the body with charges and new function indices to `out`. A function whose cost the
/// callers pay (`leaf`) only gets the new indices.
pub(super) fn rewrite(
    body: &FunctionBody<'_>,
    params: u32,
    leaf: bool,
    around: &Surroundings,
    charges: &mut Charges,
    out: &mut Vec<u8>,
) -> Result<(), InstrumentError> {
    let mut flow = Flow::read(body, |callee| {
        around.leaf_costs.get(callee as usize).map_or(0, |cost| u64::from(*cost))
    })?;
    let mut edits = Vec::new();
    if !leaf {
        let entry = flow.prepay(SLACK, &mut edits, charges) + 1;
        charges.functions += 1;
        edits.push(Edit { at: flow.start, end: flow.start, what: What::Charge(entry) });
    }
    edits.extend(flow.edits);
    // Stable: where a charge and an operator are at the same place, the charge comes first.
    edits.sort_by_key(|edit| edit.at);

    let bytes = body.as_bytes();
    let scratch = write_locals(body, params, &edits, out)?;
    let mut copied = flow.start;
    for edit in &edits {
        out.extend_from_slice(&bytes[copied..edit.at]);
        copied = edit.end;
        match edit.what {
            What::Charge(units) => write_charge(around, units, out),
            What::Refund(units) => {
                fuel_get(around, out);
                out.push(I64_CONST);
                leb_signed(units as i64, out);
                out.push(I64_ADD);
                fuel_set(around, out);
            }
            What::BulkCharge { shift } => {
                charges.bulk_operators += 1;
                write_bulk_charge(around, scratch, shift, out);
            }
            What::Function { opcode, index } => {
                out.push(opcode);
                leb(around.renumber(index), out);
            }
        }
    }
    out.extend_from_slice(&bytes[copied..]);
    Ok(())
}

/// One place of the body where bytes are put in, or replaced if `end` is behind `at`.
struct Edit {
    at: usize,
    end: usize,
    what: What,
}

enum What {
    Charge(u64),
    Refund(u64),
    /// Before a bulk operator, whose size operand (an i32, shifted left by `shift`) is on top.
    BulkCharge {
        shift: i32,
    },
    /// Replaces an operator whose only immediate is a function index.
    Function {
        opcode: u8,
        index: u32,
    },
}

/// The control flow of a body: its branches, and the weight of the straight lines between them.
struct Flow {
    /// Offset of the first operator in the body.
    start: usize,
    steps: Vec<Step>,
    frames: Vec<Frame>,
    table_targets: Vec<usize>,
    edits: Vec<Edit>,
    refs: Vec<u32>,
    bounded: bool,
}

/// A straight line of operators and the operator that ends it.
struct Step {
    /// The weight of the line, ending operator included.
    weight: u64,
    /// Offset just behind the ending operator.
    end: usize,
    kind: Kind,
}

/// Operators that matter to the flow; the numbers are frames, in order of their appearance.
enum Kind {
    Loop,
    If(usize),
    Else(usize),
    End(usize),
    Jump(usize),
    Branch(usize),
    /// A range of `table_targets`.
    Table(usize, usize),
    Leave,
}

/// A block of any kind; the body itself is frame 0.
#[derive(Default)]
struct Frame {
    is_loop: bool,
    in_table: bool,
    catches: bool,
    /// The prepayment at the label, known once the walk backwards has passed its `end`.
    at_label: u64,
    /// The prepayment at the start of the `else` arm, and the offset of that.
    at_else: Option<(u64, usize)>,
}

impl Flow {
    fn read(
        body: &FunctionBody<'_>,
        callee_cost: impl Fn(u32) -> u64,
    ) -> Result<Self, InstrumentError> {
        let base = body.range().start;
        let mut reader = body.get_operators_reader()?;
        let mut flow = Self {
            start: reader.original_position() - base,
            steps: Vec::new(),
            frames: vec![Frame::default()],
            table_targets: Vec::new(),
            edits: Vec::new(),
            refs: Vec::new(),
            bounded: true,
        };
        let mut open = vec![0];
        let mut weight_since = 0;
        while !reader.eof() {
            let (operator, at) = reader.read_with_offset()?;
            let (at, end) = (at - base, reader.original_position() - base);
            weight_since += weight(&operator);
            if let Operator::Call { function_index } = operator {
                weight_since += callee_cost(function_index);
            }
            flow.note_edits(&operator, at, end);
            let unbalanced = || InstrumentError::Unbalanced { offset: base + at };
            if let Some(kind) = flow.kind(&operator, &mut open).ok_or_else(unbalanced)? {
                flow.steps.push(Step { weight: weight_since, end, kind });
                weight_since = 0;
            }
        }
        Ok(flow)
    }

    /// The kind of step that ends with this operator, if one does. Outer `None`: the body is not
    /// valid.
    fn kind(&mut self, operator: &Operator<'_>, open: &mut Vec<usize>) -> Option<Option<Kind>> {
        let label = |open: &[usize], depth: u32| {
            open.len().checked_sub(1 + depth as usize).map(|index| open[index])
        };
        let kind = match operator {
            Operator::Block { .. } => {
                open.push(self.push_frame(false));
                return Some(None);
            }
            Operator::TryTable { try_table } => {
                for catch in &try_table.catches {
                    let (Catch::One { label: depth, .. }
                    | Catch::OneRef { label: depth, .. }
                    | Catch::All { label: depth }
                    | Catch::AllRef { label: depth }) = catch;
                    let frame = label(open, *depth)?;
                    self.frames[frame].catches = true;
                }
                open.push(self.push_frame(false));
                return Some(None);
            }
            Operator::Loop { .. } => {
                open.push(self.push_frame(true));
                self.bounded = false;
                Kind::Loop
            }
            Operator::If { .. } => {
                open.push(self.push_frame(false));
                Kind::If(*open.last()?)
            }
            Operator::Else => Kind::Else(*open.last()?),
            Operator::End => Kind::End(open.pop()?),
            Operator::Br { relative_depth } => Kind::Jump(label(open, *relative_depth)?),
            Operator::BrIf { relative_depth }
            | Operator::BrOnNull { relative_depth }
            | Operator::BrOnNonNull { relative_depth }
            | Operator::BrOnCast { relative_depth, .. }
            | Operator::BrOnCastFail { relative_depth, .. } => {
                Kind::Branch(label(open, *relative_depth)?)
            }
            Operator::BrTable { targets } => {
                let from = self.table_targets.len();
                for depth in targets.targets().chain([Ok(targets.default())]) {
                    let frame = label(open, depth.ok()?)?;
                    self.frames[frame].in_table = true;
                    self.table_targets.push(frame);
                }
                Kind::Table(from, self.table_targets.len())
            }
            Operator::Return
            | Operator::Unreachable
            | Operator::Throw { .. }
            | Operator::ThrowRef
            | Operator::ReturnCall { .. }
            | Operator::ReturnCallIndirect { .. }
            | Operator::ReturnCallRef { .. } => Kind::Leave,
            _ => return Some(None),
        };
        Some(Some(kind))
    }

    fn push_frame(&mut self, is_loop: bool) -> usize {
        self.frames.push(Frame { is_loop, ..Frame::default() });
        self.frames.len() - 1
    }

    /// Notes what changes in the operator itself, and whether it makes the work unbounded.
    fn note_edits(&mut self, operator: &Operator<'_>, at: usize, end: usize) {
        let function = match operator {
            Operator::Call { function_index } => Some((0x10, *function_index)),
            Operator::ReturnCall { function_index } => Some((0x12, *function_index)),
            Operator::RefFunc { function_index } => {
                self.refs.push(*function_index);
                Some((0xd2, *function_index))
            }
            _ => None,
        };
        if let Some((opcode, index)) = function {
            self.edits.push(Edit { at, end, what: What::Function { opcode, index } });
        }
        if let Some(shift) = bulk_shift(operator) {
            self.edits.push(Edit { at, end: at, what: What::BulkCharge { shift } });
            self.bounded = false;
        }
        self.bounded &= !matches!(
            operator,
            Operator::Call { .. }
                | Operator::CallIndirect { .. }
                | Operator::CallRef { .. }
                | Operator::ReturnCall { .. }
                | Operator::ReturnCallIndirect { .. }
                | Operator::ReturnCallRef { .. }
                | Operator::Throw { .. }
                | Operator::ThrowRef
                | Operator::TryTable { .. }
        );
    }

    /// Walks backwards, adds the charges to `edits` and returns the prepayment at the start.
    fn prepay(&mut self, slack: u64, edits: &mut Vec<Edit>, charges: &mut Charges) -> u64 {
        let frames = &mut self.frames;
        let mut paid = 0;
        for step in self.steps.iter().rev() {
            let mut edit = |at: usize, what| edits.push(Edit { at, end: at, what });
            match step.kind {
                // The body's own end: an exception or a branch that arrives here just returns.
                Kind::End(0) => paid = 0,
                Kind::End(frame) => {
                    let frame = &mut frames[frame];
                    if !frame.is_loop {
                        let due = (frame.catches && paid > 0) || (frame.in_table && paid > slack);
                        if due {
                            charges.branches += 1;
                            edit(step.end, What::Charge(paid));
                            paid = 0;
                        }
                        frame.at_label = paid;
                    }
                }
                Kind::Loop => {
                    charges.loops += 1;
                    edit(step.end, What::Charge(paid + 1));
                    paid = 0;
                }
                Kind::Else(frame) => {
                    frames[frame].at_else = Some((paid, step.end));
                    paid = frames[frame].at_label;
                }
                Kind::If(frame) => {
                    let (other, other_at) = match frames[frame].at_else {
                        Some((other, at)) => (other, Some(at)),
                        None => (frames[frame].at_label, None),
                    };
                    paid = part((paid, step.end), (other, other_at), slack, &mut edit, charges);
                }
                Kind::Branch(frame) => {
                    let taken = (frames[frame].at_label, None);
                    paid = part((paid, step.end), taken, slack, &mut edit, charges);
                }
                Kind::Jump(frame) => paid = frames[frame].at_label,
                Kind::Table(from, to) => {
                    let targets = self.table_targets[from..to].iter();
                    paid = targets.map(|frame| frames[*frame].at_label).max().unwrap_or(0);
                }
                Kind::Leave => paid = 0,
            }
            paid += step.weight;
        }
        paid
    }
}

/// Control parts: into a path where a charge can be put, and into another where it may not be
/// possible (a taken branch has no place of its own). Returns the prepayment before.
fn part(
    (paid, at): (u64, usize),
    (other, other_at): (u64, Option<usize>),
    slack: u64,
    edit: &mut impl FnMut(usize, What),
    charges: &mut Charges,
) -> u64 {
    if paid.abs_diff(other) <= slack {
        return paid.max(other);
    }
    if paid > other {
        charges.branches += 1;
        edit(at, What::Charge(paid - other));
        return other;
    }
    if let Some(other_at) = other_at {
        charges.branches += 1;
        edit(other_at, What::Charge(other - paid));
        return paid;
    }
    charges.refunds += 1;
    edit(at, What::Refund(other - paid));
    other
}

/// What executing an operator costs, calls to leaf functions and bulk sizes aside.
fn weight(operator: &Operator<'_>) -> u64 {
    match operator {
        // These are syntax or free. Loop headers are charged for separately.
        Operator::Nop
        | Operator::Drop
        | Operator::Block { .. }
        | Operator::Loop { .. }
        | Operator::Else
        | Operator::End
        | Operator::Return
        | Operator::Unreachable => 0,
        Operator::I32DivS
        | Operator::I32DivU
        | Operator::I32RemS
        | Operator::I32RemU
        | Operator::I64DivS
        | Operator::I64DivU
        | Operator::I64RemS
        | Operator::I64RemU => 8,
        Operator::F32Div | Operator::F64Div | Operator::F32Sqrt | Operator::F64Sqrt => 4,
        Operator::Call { .. } | Operator::ReturnCall { .. } => CALL,
        Operator::CallIndirect { .. }
        | Operator::CallRef { .. }
        | Operator::ReturnCallIndirect { .. }
        | Operator::ReturnCallRef { .. } => CALL_INDIRECT,
        Operator::Throw { .. } | Operator::ThrowRef => THROW,
        Operator::MemoryGrow { .. } | Operator::TableGrow { .. } => GROW,
        Operator::ArrayNewFixed { array_size, .. } => 8 + u64::from(*array_size),
        _ => 1,
    }
}

/// By how much to shift the size operand of a bulk operator to get units; `None` for others. The
/// operand is an i32 on top of the stack in all of them.
fn bulk_shift(operator: &Operator<'_>) -> Option<i32> {
    let element_bytes_log2 = match operator {
        Operator::MemoryFill { .. } | Operator::MemoryCopy { .. } => 0,
        Operator::MemoryGrow { .. } => PAGE_BYTES_LOG2,
        Operator::TableFill { .. }
        | Operator::TableCopy { .. }
        | Operator::TableInit { .. }
        | Operator::TableGrow { .. } => TABLE_ELEMENT_BYTES_LOG2,
        // Elements have at most 16 bytes.
        Operator::ArrayNew { .. }
        | Operator::ArrayNewDefault { .. }
        | Operator::ArrayNewElem { .. }
        | Operator::ArrayInitElem { .. }
        | Operator::ArrayFill { .. }
        | Operator::ArrayCopy { .. } => BYTES_PER_UNIT_LOG2,
        _ => return None,
    };
    Some(element_bytes_log2 as i32 - BYTES_PER_UNIT_LOG2 as i32)
}

const CALL_OPCODE: u8 = 0x10;
const END: u8 = 0x0b;
const GLOBAL_GET: u8 = 0x23;
const GLOBAL_SET: u8 = 0x24;
const I32: u8 = 0x7f;
const I64_ADD: u8 = 0x7c;
const I64_CONST: u8 = 0x42;
const I64_EXTEND_I32_U: u8 = 0xad;
const I64_LT_S: u8 = 0x53;
const I64_SHL: u8 = 0x86;
const I64_SHR_U: u8 = 0x88;
const I64_SUB: u8 = 0x7d;
const IF_VOID: [u8; 2] = [0x04, 0x40];
const LOCAL_GET: u8 = 0x20;
const LOCAL_TEE: u8 = 0x22;

/// Copies the declarations of locals. If there are bulk operators, appends an i32 for their size
/// operand and returns its index.
fn write_locals(
    body: &FunctionBody<'_>,
    params: u32,
    edits: &[Edit],
    out: &mut Vec<u8>,
) -> Result<u32, InstrumentError> {
    let locals = body.get_locals_reader()?;
    let base = body.range().start;
    let groups_at = locals.original_position() - base;
    let groups = locals.get_count();
    let end = body.get_operators_reader()?.original_position() - base;
    let bytes = body.as_bytes();
    if !edits.iter().any(|edit| matches!(edit.what, What::BulkCharge { .. })) {
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

/// `fuel -= units; if fuel < 0 { slice() }`
fn write_charge(around: &Surroundings, units: u64, out: &mut Vec<u8>) {
    fuel_get(around, out);
    out.push(I64_CONST);
    leb_signed(units as i64, out);
    out.push(I64_SUB);
    fuel_set(around, out);
    write_check(around, out);
}

/// The same for a size operand: `units = extend_unsigned(size) << shift`. It has 32 bits and
/// `shift` is at most 12, so this does not come near the sign.
fn write_bulk_charge(around: &Surroundings, scratch: u32, shift: i32, out: &mut Vec<u8>) {
    out.push(LOCAL_TEE);
    leb(scratch, out);
    fuel_get(around, out);
    out.push(LOCAL_GET);
    leb(scratch, out);
    out.extend_from_slice(&[I64_EXTEND_I32_U, I64_CONST]);
    leb_signed(i64::from(shift.abs()), out);
    out.push(if shift < 0 { I64_SHR_U } else { I64_SHL });
    out.push(I64_SUB);
    fuel_set(around, out);
    write_check(around, out);
}

fn write_check(around: &Surroundings, out: &mut Vec<u8>) {
    fuel_get(around, out);
    out.extend_from_slice(&[I64_CONST, 0, I64_LT_S]);
    out.extend_from_slice(&IF_VOID);
    out.push(CALL_OPCODE);
    leb(around.slice, out);
    out.push(END);
}

fn fuel_get(around: &Surroundings, out: &mut Vec<u8>) {
    out.push(GLOBAL_GET);
    leb(around.fuel_global, out);
}

fn fuel_set(around: &Surroundings, out: &mut Vec<u8>) {
    out.push(GLOBAL_SET);
    leb(around.fuel_global, out);
}

/// Appends an unsigned LEB128 number.
pub(super) fn leb(mut value: u32, out: &mut Vec<u8>) {
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
