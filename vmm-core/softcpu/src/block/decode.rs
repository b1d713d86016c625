//! From RIP to a block: instruction fetch and decoding.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction};

use super::Block;
use super::liveness::overwritten_flags;
use super::op::BlockPtr;
use super::slow::slow_handler;
use super::translate::Builder;
use crate::cpu::{Cpu, Fault, mode, seg, vector};
use crate::memory::{PAGE_SIZE, line_mask};
use crate::mmu::{Target, host, tlb, walk::Access};

/// Most instructions of a block.
const MAX_INSTRUCTIONS: usize = 48;
/// Longest instruction.
const MAX_LENGTH: usize = 15;
/// The guest-physical page of blocks that are not from RAM.
const NOWHERE: u64 = !0xfff;
/// Bytes that are looked at for one block.
const WINDOW: usize = 320;

impl Cpu {
    /// Finds or decodes the block at RIP. `single` asks for a block of one instruction.
    pub(crate) fn find_block(&mut self, single: bool) -> Result<BlockPtr, Fault> {
        let rip = self.rip();
        if !single && let Some(block) = self.blocks.block_at(rip) {
            return Ok(block);
        }
        let mode = if single { self.mode | mode::SINGLE } else { self.mode };
        let linear = self.linear_rip();
        if !self.code64 && rip > u64::from(self.segs[seg::CS].limit) {
            return Err(self.gp());
        }
        let user = self.user != 0;
        let target = self.translate(linear, 1, Access::Execute, user)?;
        let Target::Host(host) = target else { return self.decode_from_device(linear, mode) };
        let info = self.tlb.info[tlb::index(linear, self.user)];
        let gpa = info.page | linear & (PAGE_SIZE - 1);
        let found = match self.blocks.find(gpa, mode) {
            Some(block) if block.second_page.is_none() => Some(block),
            Some(block) => {
                let next = self.second_page(linear, user)?;
                if block.second_page != next {
                    // The next page is mapped to something else now.
                    self.blocks.invalidate_page(block.gpa & !(PAGE_SIZE - 1));
                }
                (block.second_page == next).then_some(block)
            }
            None => None,
        };
        let block = match found {
            Some(block) => {
                self.blocks.promote(block);
                block
            }
            None => self.decode(linear, gpa, host, mode)?,
        };
        if !single && block.second_page.is_none() {
            self.blocks.remember_jump(rip, info.global, block);
        }
        Ok(block)
    }

    /// Guest-physical address of the page after the one at `linear`, for fetching; `None` if it is no RAM.
    fn second_page(&mut self, linear: u64, user: bool) -> Result<Option<u64>, Fault> {
        let next = self.wrap((linear | (PAGE_SIZE - 1)).wrapping_add(1));
        match self.translate(next, 1, Access::Execute, user)? {
            Target::Host(_) => Ok(Some(self.tlb.info[tlb::index(next, usize::from(user))].page)),
            Target::Device(_) => Ok(None),
        }
    }

    /// Decodes a block from RAM.
    fn decode(&mut self, linear: u64, gpa: u64, host: u64, mode: u16) -> Result<BlockPtr, Fault> {
        let offset = (gpa % PAGE_SIZE) as usize;
        let room = PAGE_SIZE as usize - offset;
        let mut window = [0u8; WINDOW];
        let mut len = room.min(WINDOW);
        // SAFETY: `host` is the fetch translation of `gpa`, and `len` bytes are within its page.
        unsafe { host::copy(window.as_mut_ptr() as usize as u64, host, len) };
        let mut second_page = None;
        let mut instructions = decode_window(&window[..len], offset, mode, room <= len);
        if instructions.is_empty() {
            // The first instruction crosses into the next page, or is invalid.
            if room < MAX_LENGTH {
                let user = self.user != 0;
                let next = self.wrap((linear | (PAGE_SIZE - 1)).wrapping_add(1));
                let target = self.translate(next, 1, Access::Execute, user)?;
                if let Target::Host(next_host) = target {
                    second_page = Some(self.tlb.info[tlb::index(next, usize::from(user))].page);
                    let to = window[room..].as_mut_ptr() as usize as u64;
                    // SAFETY: the first bytes of a page, into the window that is larger than both parts.
                    unsafe { host::copy(to, next_host, MAX_LENGTH) };
                    len = room + MAX_LENGTH;
                }
            }
            instructions = decode_window(&window[..len], offset, mode | mode::SINGLE, false);
            if instructions.is_empty() {
                return Err(self.invalid_instruction(&window[..len.min(MAX_LENGTH)]));
            }
            if instructions[0].len() <= room {
                second_page = None;
            }
        }
        let used = instructions.last().map_or(0, |i| i.next_ip() as usize - offset);
        self.mark_code(gpa, used.min(room) as u64);
        if let Some(page) = second_page {
            self.mark_code(page, (used - room) as u64);
        } else {
            let mut again = [0u8; WINDOW];
            // SAFETY: as above.
            unsafe { host::copy(again.as_mut_ptr() as usize as u64, host, used) };
            if again[..used] != window[..used] {
                // Another processor wrote between the copy and the mark.
                return self.decode(linear, gpa, host, mode);
            }
        }
        let block = self.build(&instructions, gpa, mode, second_page);
        Ok(self.blocks.insert(block))
    }

    /// Executing from something else than RAM: one instruction at a time, never remembered.
    fn decode_from_device(&mut self, linear: u64, mode: u16) -> Result<BlockPtr, Fault> {
        let mut window = [0u8; MAX_LENGTH];
        let mut len = 0;
        for (i, byte) in window.iter_mut().enumerate() {
            let at = self.wrap(linear.wrapping_add(i as u64));
            match self.load_slow(at, 1, self.user != 0) {
                Ok(value) => *byte = value as u8,
                Err(fault) if i == 0 => return Err(fault),
                Err(_) => {
                    self.pending = None;
                    break;
                }
            }
            len = i + 1;
        }
        let offset = (linear % PAGE_SIZE) as usize;
        let instructions = decode_window(&window[..len], offset, mode | mode::SINGLE, false);
        if instructions.is_empty() {
            return Err(self.invalid_instruction(&window[..len]));
        }
        // A guest-physical page that does not exist keeps it apart from everything else.
        let block = self.build(&instructions, NOWHERE, mode | mode::SINGLE, None);
        self.blocks.invalidate_page(NOWHERE);
        Ok(self.blocks.insert(block))
    }

    fn invalid_instruction(&mut self, bytes: &[u8]) -> Fault {
        if bytes.len() >= MAX_LENGTH {
            let mut decoder = Decoder::new(64, bytes, DecoderOptions::NONE);
            let _ = decoder.decode();
            if decoder.last_error() == DecoderError::NoMoreBytes {
                return self.raise(vector::GP, Some(0));
            }
        }
        self.raise(vector::UD, None)
    }

    /// Records that these bytes (within one page) are decoded, so that writes to them are noticed.
    fn mark_code(&mut self, gpa: u64, len: u64) {
        let Some((region, _)) = self.find_ram(gpa) else { return };
        let page = region.page(gpa);
        let lines = line_mask(gpa, len);
        let old = page.code.fetch_or(lines, Ordering::SeqCst);
        if old != 0 {
            return;
        }
        // The page was no code page: processors may be able to write to it unnoticed.
        self.tlb.forget_writes_to(gpa & !(PAGE_SIZE - 1));
        let memory = self.memory.clone();
        let member = self.member.clone();
        memory.sync().synchronise(Some(&member), &mut || {
            // Follow the requests of others while waiting for them. Nothing is held here.
            self.follow_memory();
        });
    }

    fn build(
        &mut self,
        instructions: &[Instruction],
        gpa: u64,
        mode: u16,
        second_page: Option<u64>,
    ) -> Box<Block> {
        let mut builder = Builder::new(mode, &mut self.stubs);
        let total = instructions.len();
        let quiet = overwritten_flags(instructions);
        for (i, instruction) in instructions.iter().enumerate() {
            builder.instruction(instruction, (total - i) as u8, quiet >> i & 1 != 0);
        }
        let (ops, owned) = builder.finish();
        #[cfg(feature = "native")]
        let ops = {
            let mut ops = ops;
            let counter = if gpa == NOWHERE || second_page.is_some() {
                None
            } else {
                self.native.counter(mode, &ops[0])
            };
            counter.into_iter().for_each(|counter| ops.insert(0, counter));
            ops
        };
        Box::new(Block {
            #[cfg(feature = "native")]
            native: Default::default(),
            count: total as u32,
            valid: Cell::new(true),
            ops: ops.into_boxed_slice(),
            gpa,
            mode,
            second_page,
            _owned: owned,
        })
    }
}

/// Decodes up to the end of a block. Instruction pointers are relative to the page, in which the window starts at
/// `offset`. Returns nothing if the first instruction is incomplete or invalid.
fn decode_window(bytes: &[u8], offset: usize, mode: u16, page_end: bool) -> Vec<Instruction> {
    let bits = if mode & mode::CODE64 != 0 {
        64
    } else if mode & mode::CODE32 != 0 {
        32
    } else {
        16
    };
    let limit = if mode & mode::SINGLE != 0 { 1 } else { MAX_INSTRUCTIONS };
    let mut decoder = Decoder::with_ip(bits, bytes, offset as u64, DecoderOptions::AMD);
    let mut result = Vec::new();
    while result.len() < limit && decoder.can_decode() {
        // Keep clear of the end of the window, unless it is the end of the page.
        if !page_end && !result.is_empty() && decoder.position() + MAX_LENGTH > bytes.len() {
            break;
        }
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            break;
        }
        result.push(instruction);
        if ends_block(&instruction) {
            break;
        }
    }
    result
}

/// Decodes the instructions of a block that is within one page, as they are in memory now.
#[cfg(feature = "native")]
pub(super) fn decode_again(gpa: u64, host: u64, mode: u16) -> Vec<Instruction> {
    let offset = (gpa % PAGE_SIZE) as usize;
    let room = PAGE_SIZE as usize - offset;
    let mut window = [0u8; WINDOW];
    let len = room.min(WINDOW);
    // SAFETY: `host` is the address of RAM at `gpa`, and `len` bytes are within its page.
    unsafe { host::copy(window.as_mut_ptr() as usize as u64, host, len) };
    decode_window(&window[..len], offset, mode, room <= len)
}

/// Whether no instruction of the same block can follow.
pub(super) fn ends_block(instruction: &Instruction) -> bool {
    match slow_handler(instruction) {
        Some((_, goes_on)) => !goes_on,
        None => !matches!(instruction.flow_control(), FlowControl::Next),
    }
}
