//! The store of a single host: a redb database.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::{Store, StoreError};
use crate::ha::{ClusterState, HostRecord, Update, VmRecord};
use crate::membership::KeyHolder;
use crate::types::{HostId, Incarnation, Millis, VmId};

const HOSTS: TableDefinition<'_, u16, &[u8]> = TableDefinition::new("hosts");
const VMS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("vms");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

/// A database file that one process uses at a time. Leases live in memory: they end with the process.
#[derive(Debug)]
pub struct LocalStore {
    database: Database,
    leases: BTreeMap<u64, (Instant, Duration)>,
    next_lease: u64,
    key: Option<KeyHolder>,
}

fn failed(e: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::Database(Box::new(e))
}

impl LocalStore {
    /// Opens or creates the database.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(failed)?;
        let tx = database.begin_write().map_err(failed)?;
        tx.open_table(HOSTS).map_err(failed)?;
        tx.open_table(VMS).map_err(failed)?;
        tx.open_table(META).map_err(failed)?;
        tx.commit().map_err(failed)?;
        Ok(LocalStore { database, leases: BTreeMap::new(), next_lease: 0, key: None })
    }

    fn expire(&mut self) {
        let now = Instant::now();
        self.leases.retain(|_, (until, _)| now < *until);
        if self.key.is_some_and(|k| !self.leases.contains_key(&k.lease)) {
            self.key = None;
        }
    }
}

impl Store for LocalStore {
    fn load(&mut self) -> Result<ClusterState, StoreError> {
        let tx = self.database.begin_read().map_err(failed)?;
        let mut state = ClusterState::default();
        for entry in tx.open_table(HOSTS).map_err(failed)?.iter().map_err(failed)? {
            let (id, bytes) = entry.map_err(failed)?;
            let record: HostRecord = serde_json::from_slice(bytes.value()).map_err(StoreError::Record)?;
            state.hosts.insert(HostId(id.value()), record);
        }
        for entry in tx.open_table(VMS).map_err(failed)?.iter().map_err(failed)? {
            let (id, bytes) = entry.map_err(failed)?;
            let record: VmRecord = serde_json::from_slice(bytes.value()).map_err(StoreError::Record)?;
            state.vms.insert(VmId(id.value()), record);
        }
        let meta = tx.open_table(META).map_err(failed)?;
        state.halted = meta.get("halted").map_err(failed)?.is_some_and(|v| v.value() != 0);
        Ok(state)
    }

    fn write(&mut self, token: u64, updates: &[Update]) -> Result<bool, StoreError> {
        self.expire();
        if self.key.is_none_or(|k| k.token != token) {
            return Ok(false);
        }
        let tx = self.database.begin_write().map_err(failed)?;
        {
            let mut hosts = tx.open_table(HOSTS).map_err(failed)?;
            let mut vms = tx.open_table(VMS).map_err(failed)?;
            let mut meta = tx.open_table(META).map_err(failed)?;
            for update in updates {
                match update {
                    Update::Host(id, record) => {
                        let bytes = serde_json::to_vec(record).map_err(StoreError::Record)?;
                        hosts.insert(id.0, bytes.as_slice()).map_err(failed)?;
                    }
                    Update::Vm(record) => {
                        let bytes = serde_json::to_vec(record).map_err(StoreError::Record)?;
                        vms.insert(record.spec.id.0, bytes.as_slice()).map_err(failed)?;
                    }
                    Update::Forget(id) => {
                        vms.remove(id.0).map_err(failed)?;
                    }
                    Update::Halt(on) => {
                        meta.insert("halted", u64::from(*on)).map_err(failed)?;
                    }
                }
            }
        }
        tx.commit().map_err(failed)?;
        Ok(true)
    }

    fn observe(&mut self) -> Result<Option<KeyHolder>, StoreError> {
        self.expire();
        Ok(self.key)
    }

    fn grant(&mut self, ttl: Millis) -> Result<u64, StoreError> {
        self.next_lease += 1;
        let ttl = Duration::from_millis(ttl);
        self.leases.insert(self.next_lease, (Instant::now() + ttl, ttl));
        Ok(self.next_lease)
    }

    fn campaign(&mut self, me: Incarnation, lease: u64) -> Result<Option<KeyHolder>, StoreError> {
        self.expire();
        if self.key.is_none() && self.leases.contains_key(&lease) {
            // The token rises across restarts too, so it is kept in the database.
            let tx = self.database.begin_write().map_err(failed)?;
            let token = {
                let mut meta = tx.open_table(META).map_err(failed)?;
                let last = meta.get("token").map_err(failed)?.map_or(0, |v| v.value());
                let token = last
                    .checked_add(1)
                    .ok_or_else(|| StoreError::Database("its token cannot rise any more".into()))?;
                meta.insert("token", token).map_err(failed)?;
                token
            };
            tx.commit().map_err(failed)?;
            self.key = Some(KeyHolder { host: me, token, lease });
        }
        Ok(self.key)
    }

    fn renew(&mut self, lease: u64) -> Result<bool, StoreError> {
        self.expire();
        Ok(self.leases.get_mut(&lease).map(|(until, ttl)| *until = Instant::now() + *ttl).is_some())
    }

    fn resign(&mut self, lease: u64) -> Result<(), StoreError> {
        self.leases.remove(&lease);
        self.expire();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_cannot_rise_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = LocalStore::open(&dir.path().join("store")).unwrap();
        let me = Incarnation { host: HostId(1), generation: 1 };
        for (last, works) in [(u64::MAX - 1, true), (u64::MAX, false)] {
            let tx = store.database.begin_write().unwrap();
            tx.open_table(META).unwrap().insert("token", last).unwrap();
            tx.commit().unwrap();
            let lease = store.grant(5000).unwrap();
            assert_eq!(store.campaign(me, lease).is_ok(), works, "{last}");
            store.resign(lease).unwrap();
        }
    }
}
