//! Which blocks are translated together, and their code.

use iced_x86::{BlockEncoderOptions, Instruction};

use super::super::decode::{decode_again, ends_block};
use super::super::op::{BlockPtr, Op, OpPtr};
use super::super::translate::Builder;
use super::branch::Neighbour;
use super::emit::{Emitter, Ops, Refused};
use super::step::{Form, Step};
use super::{Parts, resume, warm};
use crate::block::op::Handler;
use crate::cpu::Cpu;
use crate::memory::PAGE_SIZE;

/// Most blocks that are translated together.
const MAX_BLOCKS: usize = 32;

/// Blocks of one page that lead to each other.
pub(super) struct Region {
    blocks: Vec<Member>,
}

struct Member {
    block: BlockPtr,
    steps: Vec<Step>,
    parts: Parts,
}

impl Cpu {
    /// The block and those that it is linked with, as far as they can be translated. `None` if it cannot.
    pub(super) fn collect_region(&mut self, block: BlockPtr) -> Option<Region> {
        let mut blocks = vec![self.member(block)?];
        let mut next = 0;
        while next < blocks.len() && blocks.len() < MAX_BLOCKS {
            for link in links(&blocks[next]) {
                let gpa = block.gpa & !(PAGE_SIZE - 1) | u64::from(link.off);
                let Some(found) = self.blocks.find(gpa, block.mode) else { continue };
                let known = blocks.iter().any(|member| member.block == found);
                if !known && is_counted(found) && found.first().as_link() == link.as_link() {
                    blocks.extend(self.member(found));
                }
            }
            next += 1;
        }
        blocks.truncate(MAX_BLOCKS);
        Some(Region { blocks })
    }

    /// Decodes a block again. `None` if its memory has changed, or it is not worth a translation.
    fn member(&mut self, block: BlockPtr) -> Option<Member> {
        if block.second_page.is_some() {
            return None;
        }
        let (_, host) = self.find_ram(block.gpa)?;
        let instructions = decode_again(block.gpa, host, block.mode);
        let same = instructions.len() == block.count as usize
            && instructions
                .iter()
                .zip(&block.ops[1..])
                .all(|(i, op)| (i.ip(), i.len()) == (u64::from(op.off), usize::from(op.len)));
        if !same {
            return None;
        }
        let steps: Vec<Step> =
            instructions.iter().map(|i| Step::new(i, ends_block(i), &self.stubs)).collect();
        let native =
            steps.iter().filter(|step| !matches!(step.form, Form::Call | Form::Last | Form::Nop)).count();
        if native == 0 {
            return None;
        }
        let parts = self.alone_ops(&instructions, block.mode);
        Some(Member { block, steps, parts })
    }

    /// The operation of each instruction on its own.
    fn alone_ops(&mut self, instructions: &[Instruction], mode: u16) -> Parts {
        let (mut ops, mut owned) = (Vec::new(), Vec::new());
        let total = instructions.len();
        for (n, instruction) in instructions.iter().enumerate() {
            let mut builder = Builder::new(mode, &mut self.stubs);
            builder.instruction(instruction, (total - n) as u8, false);
            let (built, kept) = builder.finish();
            ops.extend(built.into_iter().take(1));
            ops.push(Op::bare(resume));
            owned.push(kept);
        }
        Parts { ops: ops.into_boxed_slice(), _owned: owned }
    }

    /// Generates code and lets the blocks begin with it. `None` if that is not possible, `Some(false)` if there is no
    /// room.
    pub(super) fn translate_region(&mut self, region: Region) -> Option<bool> {
        let code = self.native.code.as_mut()?;
        let ip = code.arena.next_address();
        let (bytes, entries) = match generate(&region, &code.glue, ip) {
            Ok(generated) => generated,
            Err(Refused) => return None,
        };
        if code.arena.room() < bytes.len() && code.arena.used() > code.start {
            return Some(false);
        }
        if let Err(error) = code.arena.append(&bytes) {
            // Earlier code may not be executable any more.
            tracing::warn!(%error, "No memory for generated code; the interpreter goes on alone");
            self.native.give_up();
            return Some(false);
        }
        self.native.translated += region.blocks.len() as u64;
        for (member, entry) in region.blocks.into_iter().zip(entries) {
            let first = &member.block.ops[0];
            first.imm.set(entry);
            first.handler.set(self.native.enter);
            // A block that has parts already was translated with another one; `is_counted` keeps such out.
            let _ = member.block.native.set(member.parts);
        }
        Some(true)
    }
}

/// Whether the block begins with its counter still.
fn is_counted(block: BlockPtr) -> bool {
    std::ptr::fn_addr_eq(block.ops[0].handler.get(), warm as Handler)
}

/// First operations of blocks that a block is linked to.
fn links(member: &Member) -> Vec<OpPtr> {
    let last = member.steps.len();
    let near = |n: usize| {
        let op = member.block.ops.get(n)?;
        (op.imm.get() != 0).then(|| OpPtr::from_link(op.imm.get()))
    };
    let Some(step) = member.steps.last() else { return Vec::new() };
    let inside = |target: u64| target < PAGE_SIZE;
    let i = &step.instruction;
    let branch = step.form == Form::Branch && i.op0_kind() == iced_x86::OpKind::NearBranch64;
    let mut found = Vec::new();
    if branch && inside(i.near_branch64()) {
        found.extend(near(last));
    }
    let goes_on = !matches!(step.form, Form::Branch | Form::Last) || i.is_jcc_short_or_near();
    if goes_on && inside(i.next_ip()) {
        found.extend(near(last + 1));
    }
    found
}

fn generate(region: &Region, glue: &super::glue::Glue, ip: u64) -> Result<(Vec<u8>, Vec<u64>), Refused> {
    let mut emitter = Emitter::new(glue)?;
    let mut neighbours = Vec::new();
    for member in &region.blocks {
        neighbours.push(Neighbour {
            offset: (member.block.gpa % PAGE_SIZE) as u16,
            body: emitter.a.create_label(),
            first: member.block.first().as_link(),
            count: member.block.count,
        });
    }
    for (n, member) in region.blocks.iter().enumerate() {
        let ops =
            Ops { block: member.block.first().as_link(), alone: member.parts.ops.as_ptr() as usize as u64 };
        emitter.place(&mut neighbours[n].body)?;
        emitter.steps(&member.steps, ops)?;
        emitter.end(&member.steps, ops, &neighbours)?;
    }
    emitter.finish()?;
    let result = emitter.a.assemble_options(ip, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let entries: Result<Vec<u64>, _> = neighbours.iter().map(|n| result.label_ip(&n.body)).collect();
    Ok((result.inner.code_buffer, entries?))
}
