//! Handles that can be checked.
//!
//! A handle is a number dressed as a pointer to an incomplete C type: it holds the kind of object, an index into a
//! table, and the generation of that slot. It is never dereferenced, so a stale or invented one is found out by a
//! look-up. The table is the one piece of process-wide state of the library; it holds references and does nothing.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::border::Failure;
use crate::status::nacre_status::NACRE_BAD_HANDLE;

const INDEX_BITS: u32 = 28;
const GENERATION_BITS: u32 = 28;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
const GENERATION_MASK: u64 = (1 << GENERATION_BITS) - 1;

struct Slot<T: ?Sized> {
    generation: u64,
    value: Option<Arc<T>>,
}

struct Slots<T: ?Sized> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

/// The live objects of one kind.
pub struct Table<T: ?Sized> {
    kind: u8,
    name: &'static str,
    slots: RwLock<Slots<T>>,
}

impl<T: ?Sized> Table<T> {
    /// A table for the kind with this number (1 to 255, distinct for each table) and name.
    pub const fn new(kind: u8, name: &'static str) -> Self {
        assert!(kind != 0, "kind 0 would make null a handle");
        Self { kind, name, slots: RwLock::new(Slots { slots: Vec::new(), free: Vec::new() }) }
    }

    /// Stores an object and returns its handle.
    ///
    /// # Errors
    /// Fails when 2^28 objects of this kind are alive.
    pub fn insert<H>(&self, value: Arc<T>) -> Result<*mut H, Failure> {
        let mut guard = self.slots.write();
        let table = &mut *guard;
        let index = match table.free.pop() {
            Some(index) => index,
            None => {
                let index = table.slots.len() as u64;
                if index > INDEX_MASK {
                    return Err(Failure::no_resources("Too many objects are alive; free some"));
                }
                table.slots.push(Slot { generation: 0, value: None });
                index as u32
            }
        };
        let slot = &mut table.slots[index as usize];
        slot.generation = (slot.generation + 1) & GENERATION_MASK;
        slot.value = Some(value);
        let raw = u64::from(self.kind) << (INDEX_BITS + GENERATION_BITS)
            | slot.generation << INDEX_BITS
            | u64::from(index);
        Ok(std::ptr::without_provenance_mut(raw as usize))
    }

    fn decode<H>(&self, handle: *const H) -> Result<(usize, u64), Failure> {
        let raw = handle.addr() as u64;
        if raw == 0 {
            return Err(Failure::new(NACRE_BAD_HANDLE, format!("The {} handle is null", self.name)));
        }
        if raw >> (INDEX_BITS + GENERATION_BITS) != u64::from(self.kind) {
            return Err(Failure::new(NACRE_BAD_HANDLE, format!("The handle is not that of a {}", self.name)));
        }
        Ok(((raw & INDEX_MASK) as usize, raw >> INDEX_BITS & GENERATION_MASK))
    }

    fn stale(&self) -> Failure {
        Failure::new(
            NACRE_BAD_HANDLE,
            format!("The {} was freed already, or its handle is damaged", self.name),
        )
    }

    /// The object behind a handle.
    ///
    /// # Errors
    /// Fails when the handle is null, of another kind, or its object was freed.
    pub fn get<H>(&self, handle: *const H) -> Result<Arc<T>, Failure> {
        let (index, generation) = self.decode(handle)?;
        let guard = self.slots.read();
        let slot = guard.slots.get(index).filter(|s| s.generation == generation);
        slot.and_then(|s| s.value.clone()).ok_or_else(|| self.stale())
    }

    /// Takes the object out; its handle is stale from now on.
    ///
    /// # Errors
    /// Fails when the handle is null, of another kind, or its object was freed.
    pub fn remove<H>(&self, handle: *const H) -> Result<Arc<T>, Failure> {
        let (index, generation) = self.decode(handle)?;
        let mut guard = self.slots.write();
        let slot = guard.slots.get_mut(index).filter(|s| s.generation == generation);
        let value = slot.and_then(|s| s.value.take()).ok_or_else(|| self.stale())?;
        guard.free.push(index as u32);
        Ok(value)
    }

    /// How many objects are alive.
    pub fn len(&self) -> usize {
        let guard = self.slots.read();
        guard.slots.len() - guard.free.len()
    }

    /// Whether no object is alive.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    enum Opaque {}

    #[test]
    fn stale_foreign_and_invented_handles_are_found_out() {
        let apples: Table<u32> = Table::new(1, "apple");
        let pears: Table<u32> = Table::new(2, "pear");
        let a: *mut Opaque = apples.insert(Arc::new(7)).unwrap();
        assert_eq!(*apples.get(a).unwrap(), 7);
        assert!(pears.get(a).is_err());
        assert!(apples.get::<Opaque>(std::ptr::null()).is_err());
        for bits in [1usize, 0x1000, usize::MAX, a.addr() + 1, a.addr() + (1 << INDEX_BITS)] {
            assert!(apples.get::<Opaque>(std::ptr::without_provenance(bits)).is_err(), "{bits:#x}");
        }
        assert_eq!(*apples.remove(a).unwrap(), 7);
        assert!(apples.get(a).is_err());
        assert!(apples.remove(a).is_err(), "double free");
        let b: *mut Opaque = apples.insert(Arc::new(8)).unwrap();
        assert_ne!(a, b, "a reused slot has another handle");
        assert!(apples.get(a).is_err());
        assert_eq!(apples.len(), 1);
    }
}
