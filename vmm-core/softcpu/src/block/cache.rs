//! Where decoded blocks are kept: by guest-physical page, and for the fast path by linear address.

use std::collections::HashMap;

use super::Block;
use super::op::{BlockPtr, OpPtr, not_entered};
use crate::cpu::mode;

/// Entries of the table by linear address.
const JUMPS: usize = 4096;
/// Entries of the table by guest-physical address.
const PHYSICAL: usize = 16384;
/// Invalid blocks that are kept until they are freed together.
const MAX_DEAD: usize = 2048;
/// Operations that are kept before everything is thrown away.
const MAX_OPS: usize = 4 << 20;

/// Maps a linear address to a block. `key` says when that was true.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Jump {
    rip: u64,
    key: u64,
    block: BlockPtr,
    /// The first operation of the block.
    first: OpPtr,
}

/// What generated code has to know of the table by linear address.
#[cfg(feature = "native")]
pub(super) mod layout {
    use std::mem::offset_of;

    use super::{BlockCache, JUMPS, Jump};

    /// The table's address within [`BlockCache`].
    pub const JUMPS_AT: i32 = offset_of!(BlockCache, jumps) as i32;
    /// The two valid keys within [`BlockCache`].
    pub const KEYS: i32 = offset_of!(BlockCache, keys) as i32;
    /// Bits of an entry's index.
    pub const JUMP_MASK: u32 = JUMPS as u32 - 1;
    /// An entry's size as a power of two.
    pub const JUMP_SHIFT: u32 = size_of::<Jump>().trailing_zeros();
    pub const JUMP_RIP: i32 = offset_of!(Jump, rip) as i32;
    pub const JUMP_KEY: i32 = offset_of!(Jump, key) as i32;
    pub const JUMP_FIRST: i32 = offset_of!(Jump, first) as i32;
    const _: () = assert!(size_of::<Jump>().is_power_of_two());
}

const NO_JUMP: Jump = Jump { rip: 0, key: 0, block: BlockPtr::NULL, first: OpPtr::NULL };

/// All blocks of one processor.
#[expect(clippy::vec_box, reason = "links and tables point to the blocks")]
pub(crate) struct BlockCache {
    jumps: Box<[Jump; JUMPS]>,
    /// Keys of valid entries of `jumps`: mapped by a local or a global page.
    keys: [u64; 2],
    mode: u16,
    /// Changed to invalidate `jumps` (local, global).
    stamps: [u64; 2],
    physical: Box<[BlockPtr; PHYSICAL]>,
    pages: HashMap<u64, Vec<Box<Block>>>,
    /// Blocks whose only instruction crosses into this page.
    crossing: HashMap<u64, Vec<BlockPtr>>,
    dead: Vec<Box<Block>>,
    ops: usize,
    full: bool,
}

fn slot(gpa: u64, mode: u16) -> usize {
    (gpa ^ gpa >> 14 ^ u64::from(mode) << 9) as usize % PHYSICAL
}

#[inline(always)]
fn jump_slot(rip: u64) -> usize {
    (rip ^ rip >> 12) as usize % JUMPS
}

/// Mode bits that decoding depends on.
const DECODE: u16 = mode::CODE32 | mode::CODE64 | mode::STACK32 | mode::SINGLE | mode::REAL;

impl BlockCache {
    pub fn new() -> Self {
        let mut cache = Self {
            jumps: Box::new([NO_JUMP; JUMPS]),
            keys: [0; 2],
            mode: 0,
            stamps: [1, 1],
            physical: Box::new([BlockPtr::NULL; PHYSICAL]),
            pages: HashMap::new(),
            crossing: HashMap::new(),
            dead: Vec::new(),
            ops: 0,
            full: false,
        };
        cache.update_keys();
        cache
    }

    /// The processor's mode changed.
    #[inline]
    pub fn set_mode(&mut self, mode: u16) {
        if self.mode != mode {
            self.mode = mode;
            self.update_keys();
        }
    }

    fn update_keys(&mut self) {
        let mode = u64::from(self.mode) << 1;
        self.keys = [self.stamps[0] << 16 | mode, self.stamps[1] << 16 | mode | 1];
    }

    /// Linear addresses may lead elsewhere now; `global` includes those mapped by global pages.
    pub fn forget_addresses(&mut self, global: bool) {
        self.stamps[0] += 1;
        if global {
            self.stamps[1] += 1;
        }
        self.update_keys();
    }

    /// The first operation of the block at a linear address. The block may have been dropped: its first operation
    /// then leaves.
    #[inline(always)]
    pub fn jump(&self, rip: u64) -> Option<OpPtr> {
        let jump = &self.jumps[jump_slot(rip)];
        let known = jump.rip == rip && jump.key == self.keys[(jump.key & 1) as usize];
        known.then_some(jump.first)
    }

    /// The block at a linear address.
    pub fn block_at(&self, rip: u64) -> Option<BlockPtr> {
        let jump = &self.jumps[jump_slot(rip)];
        self.jump(rip).map(|_| jump.block).filter(|block| block.valid.get())
    }

    pub fn remember_jump(&mut self, rip: u64, global: bool, block: BlockPtr) {
        self.jumps[jump_slot(rip)] =
            Jump { rip, key: self.keys[usize::from(global)], block, first: block.first() };
    }

    /// Finds a block by guest-physical address.
    pub fn find(&self, gpa: u64, mode: u16) -> Option<BlockPtr> {
        let mode = mode & DECODE;
        let cached = self.physical[slot(gpa, mode)];
        if !cached.is_null() && cached.gpa == gpa && cached.mode == mode && cached.valid.get() {
            return Some(cached);
        }
        let blocks = self.pages.get(&(gpa & !0xfff))?;
        let block = blocks.iter().find(|b| b.gpa == gpa && b.mode == mode)?;
        Some(BlockPtr(&raw const **block))
    }

    /// Makes a found block faster to find.
    pub fn promote(&mut self, block: BlockPtr) {
        self.physical[slot(block.gpa, block.mode)] = block;
    }

    pub fn insert(&mut self, mut block: Box<Block>) -> BlockPtr {
        block.mode &= DECODE;
        self.ops += block.ops.len();
        self.full |= self.ops > MAX_OPS;
        let pointer = BlockPtr(&raw const *block);
        if let Some(page) = block.second_page {
            self.crossing.entry(page).or_default().push(pointer);
        }
        self.pages.entry(block.gpa & !0xfff).or_default().push(block);
        self.promote(pointer);
        pointer
    }

    /// Drops the blocks of a guest-physical page. They stay allocated until [`BlockCache::collect`].
    pub fn invalidate_page(&mut self, page: u64) {
        for block in self.pages.remove(&page).into_iter().flatten() {
            drop_block(&block);
            self.ops -= block.ops.len();
            self.dead.push(block);
        }
        for block in self.crossing.remove(&page).into_iter().flatten() {
            if !block.valid.get() {
                continue;
            }
            drop_block(&block);
            let Some(blocks) = self.pages.get_mut(&(block.gpa & !0xfff)) else { continue };
            if let Some(at) = blocks.iter().position(|b| std::ptr::eq(&**b, block.0)) {
                let block = blocks.swap_remove(at);
                self.ops -= block.ops.len();
                self.dead.push(block);
            }
        }
    }

    /// Drops everything. Only outside of the execution of blocks.
    pub fn clear(&mut self) {
        let pages: Vec<u64> = self.pages.keys().copied().collect();
        pages.into_iter().for_each(|page| self.invalidate_page(page));
        self.full = false;
        self.free_dead();
    }

    /// Frees dropped blocks if there are many. Only outside of the execution of blocks.
    #[inline]
    pub fn collect(&mut self) {
        if self.full {
            self.clear();
        } else if self.dead.len() > MAX_DEAD {
            self.free_dead();
        }
    }

    fn free_dead(&mut self) {
        // Nothing may find them any more: links to a dead block come from its own page, which died with
        // it; the tables are cleaned here.
        self.jumps.fill(NO_JUMP);
        for entry in self.physical.iter_mut() {
            if !entry.is_null() && !entry.valid.get() {
                *entry = BlockPtr::NULL;
            }
        }
        self.crossing.retain(|_, blocks| {
            blocks.retain(|b| b.valid.get());
            !blocks.is_empty()
        });
        self.dead.clear();
    }
}

/// Sees to it that a block is not entered any more, neither by a table nor by a link.
fn drop_block(block: &Block) {
    block.valid.set(false);
    block.ops[0].handler.set(not_entered);
}
