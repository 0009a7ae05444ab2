//! The fuel pass over one function body: where fuel is charged and checked, and how much.
//!
//! # Charges
//!
//! A *unit* of fuel is one operator; [`weight`] gives operators that cost more than that more, and
//! the purely syntactic ones nothing. The *work* of an execution is the sum of the weights of the
//! operators that it executed, plus one for each function entered and each loop header passed,
//! plus the size charges of bulk operators: a unit per byte.
//!
//! Fuel is paid before the work, by paths. For each point of a function the pass computes its
//! *prepayment*: what is already paid for when control arrives there. One walk backwards finds it,
//! because in structured code the target of a forward branch comes later:
//!
//! - at the end of the function, and behind an operator that leaves it, it is 0;
//! - before a straight line of operators it is their weight plus the prepayment behind them;
//! - before a loop it is 0, and at the loop header, in each iteration, the prepayment of the body
//!   plus one is charged; likewise at function entry;
//! - where control parts (`if`, `br_if`, …) the two prepayments may differ. If by at most
//!   [`SLACK`], the larger one counts and nothing is charged: the cheaper path pays up to `SLACK`
//!   too much. If by more, the difference is charged where the costlier path starts, or given back
//!   where a cheaper one starts, and both paths pay exactly;
//! - at a label that a `br_table` names the prepayment is at most `SLACK`; what is more is charged
//!   behind the label, so each arm of a `switch` pays for itself;
//! - at a label that a `try_table` catches into it is 0, as an exception brings nothing along.
//!
//! It follows that at any moment, for the operators executed so far,
//!
//! ```text
//! work <= fuel charged <= work + SLACK * partings + prepayments
//! ```
//!
//! with one prepayment for each frame that is live or was left by an exception or a trap. A call
//! that has returned is charged within `SLACK` per parting of what it did.
//!
//! # Checks
//!
//! Every function entry, loop header and bulk operator checks after its charge. There are two
//! kinds, because a call in a loop, even one that is hardly ever made, keeps the engine's register
//! allocator from holding the loop's values in registers:
//!
//! - *soft*, in loops that contain calls or other loops, and at bulk operators: if fuel is below 0
//!   the host's `slice` is called, which grants more, or traps;
//! - *hard*, in innermost loops without calls and at function entries: if fuel is below
//!   `kaa:floor`, `unreachable`.
//!
//! So a guest runs into overdraft between soft checks, but not below the floor. Between two checks
//! of any kind is only what is left of an acyclic path in each frame of the stack: a guest ends
//! within budget, overdraft, and that. `tests/metering.rs` holds this against wasmtime's count.
//!
//! # Functions without charges
//!
//! A function without loops, calls, bulk operators and exceptions does a bounded amount of work:
//! its costliest path. If that is small, the function stays as it is and its callers pay: direct
//! calls exactly that, indirect calls a flat [`CALL_INDIRECT`] that covers every such function
//! whose address is taken ([`LEAF_INDIRECT_MAX`]). Exported functions always charge.

use wasmparser::{Catch, FunctionBody, Operator};

mod write;

pub(super) use write::leb;
use write::{I64_ADD, I64_SUB, Writer, write_locals};

use super::instrument::InstrumentError;

/// How much a path may pay too much at a place where control parts, instead of a charge of its
/// own. Charges cost time, so this trades exactness for speed.
const SLACK: u64 = 64;
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

/// What the size operand of a bulk operator counts, in bytes: log2 of it. A byte is a unit; at the
/// measured 10 to 20 million units per millisecond that is about what moving bytes costs.
const PAGE_BYTES_LOG2: u8 = 16;
const TABLE_ELEMENT_BYTES_LOG2: u8 = 3;
const ARRAY_ELEMENT_BYTES_LOG2: u8 = 4;

/// What `kaa:floor` starts with: one or two seconds. A single pass of an innermost loop over what
/// a 32-bit memory holds takes less, so only endless ones get there.
pub(super) const FLOOR_DEFAULT: i64 = -(1 << 35);

/// What the pass over one function needs to know about the rest of the module.
pub(super) struct Surroundings {
    /// Functions from this index on have moved up by one to make room for `slice`.
    pub(super) slice: u32,
    pub(super) fuel_global: u32,
    pub(super) floor_global: u32,
    /// The static cost of each function (by old index) that its callers pay for; 0 for others.
    pub(super) leaf_costs: Vec<u32>,
}

impl Surroundings {
    pub(super) fn renumber(&self, function: u32) -> u32 {
        function + u32::from(function >= self.slice)
    }
}

/// What a first look at a function body tells.
pub(super) struct Survey {
    /// The costliest path, if the function does a bounded amount of work.
    pub(super) bounded_cost: Option<u64>,
    /// Functions whose address it takes.
    pub(super) refs: Vec<u32>,
}

/// How many charges of each kind were put in.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Charges {
    /// Entries.
    pub functions: u64,
    /// Loop headers.
    pub loops: u64,
    /// Those of them whose check is soft.
    pub loops_soft: u64,
    /// Where paths part or meet inside a function.
    pub branches: u64,
    /// Given back where a cheaper path starts.
    pub refunds: u64,
    /// By size operand.
    pub bulk_operators: u64,
}

impl Charges {
    pub(super) fn add(&mut self, other: &Self) {
        self.functions += other.functions;
        self.loops += other.loops;
        self.loops_soft += other.loops_soft;
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

/// Writes the body with charges and new function indices to `out`, and returns the offsets of
/// branches in it that are hardly ever taken. A function whose cost the callers pay (`leaf`) only
/// gets the new indices.
pub(super) fn rewrite(
    body: &FunctionBody<'_>,
    params: u32,
    leaf: bool,
    around: &Surroundings,
    charges: &mut Charges,
    out: &mut Vec<u8>,
) -> Result<Vec<u32>, InstrumentError> {
    let mut flow = Flow::read(body, |callee| {
        around.leaf_costs.get(callee as usize).map_or(0, |cost| u64::from(*cost))
    })?;
    let mut edits = Vec::new();
    if !leaf {
        let entry = flow.prepay(SLACK, &mut edits, charges) + 1;
        charges.functions += 1;
        edits.push(Edit::insert(flow.start, What::Charge(entry)));
        edits.push(Edit::insert(flow.start, What::HardCheck));
    }
    edits.append(&mut flow.edits);
    // Stable: where a charge and an operator are at the same place, the charge comes first.
    edits.sort_by_key(|edit| edit.at);

    let bytes = body.as_bytes();
    let has_bulk = edits.iter().any(|edit| matches!(edit.what, What::BulkCharge { .. }));
    let scratch = write_locals(body, params, has_bulk, out)?;
    let mut writer = Writer { around, scratch, unlikely: Vec::new(), out };
    let mut copied = flow.start;
    for edit in &edits {
        writer.out.extend_from_slice(&bytes[copied..edit.at]);
        copied = edit.end;
        match edit.what {
            What::Charge(units) => writer.change_fuel(units, I64_SUB),
            What::Refund(units) => writer.change_fuel(units, I64_ADD),
            What::SoftCheck => writer.soft_check(),
            What::HardCheck => writer.hard_check(),
            What::BulkCharge { bytes_log2 } => {
                charges.bulk_operators += 1;
                writer.bulk_charge(bytes_log2);
            }
            What::Function { opcode, index } => {
                writer.out.push(opcode);
                leb(around.renumber(index), writer.out);
            }
        }
    }
    writer.out.extend_from_slice(&bytes[copied..]);
    Ok(writer.unlikely)
}

/// One place of the body where bytes are put in, or replaced if `end` is behind `at`.
struct Edit {
    at: usize,
    end: usize,
    what: What,
}

impl Edit {
    fn insert(at: usize, what: What) -> Self {
        Self { at, end: at, what }
    }
}

enum What {
    Charge(u64),
    Refund(u64),
    SoftCheck,
    HardCheck,
    /// Before a bulk operator, whose size operand (an i32, in units of 2^`bytes_log2` bytes) is on
    /// top of the stack.
    BulkCharge {
        bytes_log2: u8,
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
    Loop(usize),
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
    /// There are calls, bulk operators or loops in it.
    is_soft: bool,
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
            if let Operator::Call { function_index } | Operator::ReturnCall { function_index } =
                operator
            {
                weight_since += callee_cost(function_index);
            }
            if let Operator::Try { .. } | Operator::Catch { .. } | Operator::CatchAll = operator {
                return Err(InstrumentError::Unsupported("uses legacy exceptions"));
            }
            flow.note_operator(&operator, at, end, &open);
            let unbalanced = || InstrumentError::Unbalanced { offset: at };
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
                self.soften(open);
                open.push(self.push_frame(true));
                self.bounded = false;
                Kind::Loop(*open.last()?)
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

    fn soften(&mut self, open: &[usize]) {
        for frame in open {
            self.frames[*frame].is_soft = true;
        }
    }

    fn push_frame(&mut self, is_loop: bool) -> usize {
        self.frames.push(Frame { is_loop, ..Frame::default() });
        self.frames.len() - 1
    }

    /// Notes what changes in the operator itself, and what it tells about the function.
    fn note_operator(&mut self, operator: &Operator<'_>, at: usize, end: usize, open: &[usize]) {
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
        let size = bulk_bytes_log2(operator);
        if let Some(bytes_log2) = size {
            self.edits.push(Edit::insert(at, What::BulkCharge { bytes_log2 }));
        }
        let calls = matches!(
            operator,
            Operator::Call { .. } | Operator::CallIndirect { .. } | Operator::CallRef { .. }
        );
        if calls || size.is_some() {
            self.soften(open);
            self.bounded = false;
        }
        self.bounded &= !matches!(
            operator,
            Operator::ReturnCall { .. }
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
            let mut edit = |at: usize, what| edits.push(Edit::insert(at, what));
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
                Kind::Loop(frame) => {
                    charges.loops += 1;
                    edit(step.end, What::Charge(paid + 1));
                    if frames[frame].is_soft {
                        charges.loops_soft += 1;
                        edit(step.end, What::SoftCheck);
                    } else {
                        edit(step.end, What::HardCheck);
                    }
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

/// What the size operand of a bulk operator counts (log2 of bytes); `None` for others. The operand
/// is an i32 on top of the stack in all of them.
fn bulk_bytes_log2(operator: &Operator<'_>) -> Option<u8> {
    match operator {
        Operator::MemoryFill { .. } | Operator::MemoryCopy { .. } => Some(0),
        Operator::MemoryGrow { .. } => Some(PAGE_BYTES_LOG2),
        Operator::TableFill { .. }
        | Operator::TableCopy { .. }
        | Operator::TableInit { .. }
        | Operator::TableGrow { .. } => Some(TABLE_ELEMENT_BYTES_LOG2),
        Operator::ArrayNew { .. }
        | Operator::ArrayNewDefault { .. }
        | Operator::ArrayNewElem { .. }
        | Operator::ArrayInitElem { .. }
        | Operator::ArrayFill { .. }
        | Operator::ArrayCopy { .. } => Some(ARRAY_ELEMENT_BYTES_LOG2),
        _ => None,
    }
}
