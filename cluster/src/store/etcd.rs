//! The store of many hosts: etcd.

use std::future::Future;
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse,
};
use tokio::runtime::{Builder, Runtime};

use super::{Store, StoreError};
use crate::ha::{ClusterState, Update};
use crate::membership::KeyHolder;
use crate::types::{HostId, Incarnation, Millis, VmId};

/// How long one request may take; callers repeat what failed.
const DEADLINE: Duration = Duration::from_millis(900);

/// A connection to an etcd cluster. All keys are below one prefix.
pub struct EtcdStore {
    runtime: Runtime,
    client: Client,
    prefix: String,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdStore").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

fn failed(e: Error) -> StoreError {
    StoreError::Unavailable(Box::new(e))
}

impl EtcdStore {
    /// Connects to the members at `endpoints`.
    pub fn connect(endpoints: &[String], prefix: &str) -> Result<Self, StoreError> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| StoreError::Unavailable(Box::new(e)))?;
        let options = ConnectOptions::new().with_connect_timeout(DEADLINE).with_timeout(DEADLINE);
        let client = run(&runtime, Client::connect(endpoints, Some(options)))?;
        Ok(EtcdStore { runtime, client, prefix: prefix.to_owned() })
    }

    fn key(&self) -> String {
        format!("{}/coordinator", self.prefix)
    }

    fn host(&self, id: HostId) -> String {
        format!("{}/host/{}", self.prefix, id.0)
    }

    fn halted(&self) -> String {
        format!("{}/halted", self.prefix)
    }

    fn vm(&self, id: VmId) -> String {
        format!("{}/vm/{}", self.prefix, id.0)
    }
}

fn run<T>(runtime: &Runtime, call: impl Future<Output = Result<T, Error>>) -> Result<T, StoreError> {
    runtime
        .block_on(async { tokio::time::timeout(DEADLINE, call).await })
        .map_err(|e| StoreError::Unavailable(Box::new(e)))?
        .map_err(failed)
}

fn holder(kv: &etcd_client::KeyValue) -> Result<KeyHolder, StoreError> {
    let host: Incarnation = serde_json::from_slice(kv.value()).map_err(StoreError::Record)?;
    // Revisions and leases are positive.
    Ok(KeyHolder { host, token: kv.create_revision().unsigned_abs(), lease: kv.lease().unsigned_abs() })
}

fn lease_id(lease: u64) -> i64 {
    i64::try_from(lease).unwrap_or(i64::MAX)
}

impl Store for EtcdStore {
    fn load(&mut self) -> Result<ClusterState, StoreError> {
        let prefix = format!("{}/", self.prefix);
        let options = GetOptions::new().with_prefix();
        let response = run(&self.runtime, self.client.get(prefix.clone(), Some(options)))?;
        let mut state = ClusterState::default();
        for kv in response.kvs() {
            let name = String::from_utf8_lossy(kv.key()).into_owned();
            match name[prefix.len()..].split_once('/') {
                Some(("host", id)) => {
                    let record = serde_json::from_slice(kv.value()).map_err(StoreError::Record)?;
                    if let Ok(id) = id.parse() {
                        state.hosts.insert(HostId(id), record);
                    }
                }
                Some(("vm", id)) => {
                    let record = serde_json::from_slice(kv.value()).map_err(StoreError::Record)?;
                    if let Ok(id) = id.parse() {
                        state.vms.insert(VmId(id), record);
                    }
                }
                None if &name[prefix.len()..] == "halted" => state.halted = true,
                _ => {}
            }
        }
        Ok(state)
    }

    fn write(&mut self, token: u64, updates: &[Update]) -> Result<bool, StoreError> {
        let guard = Compare::create_revision(self.key(), CompareOp::Equal, lease_id(token));
        let mut ops = Vec::with_capacity(updates.len());
        for update in updates {
            ops.push(match update {
                Update::Host(id, record) => {
                    let value = serde_json::to_vec(record).map_err(StoreError::Record)?;
                    TxnOp::put(self.host(*id), value, None)
                }
                Update::Vm(record) => {
                    let value = serde_json::to_vec(record).map_err(StoreError::Record)?;
                    TxnOp::put(self.vm(record.spec.id), value, None)
                }
                Update::Forget(id) => TxnOp::delete(self.vm(*id), None),
                Update::Halt(true) => TxnOp::put(self.halted(), "", None),
                Update::Halt(false) => TxnOp::delete(self.halted(), None),
            });
        }
        // etcd refuses a transaction that writes a key twice: the last write of each wins.
        let mut seen = std::collections::BTreeSet::new();
        let name = |u: &Update| match u {
            Update::Host(id, _) => self.host(*id),
            Update::Vm(r) => self.vm(r.spec.id),
            Update::Forget(id) => self.vm(*id),
            Update::Halt(_) => self.halted(),
        };
        let keep: Vec<bool> = updates.iter().rev().map(|u| seen.insert(name(u))).collect();
        let ops: Vec<TxnOp> =
            ops.into_iter().zip(keep.into_iter().rev()).filter(|(_, k)| *k).map(|(op, _)| op).collect();
        let txn = Txn::new().when([guard]).and_then(ops);
        Ok(run(&self.runtime, self.client.txn(txn))?.succeeded())
    }

    fn observe(&mut self) -> Result<Option<KeyHolder>, StoreError> {
        let response = run(&self.runtime, self.client.get(self.key(), None))?;
        response.kvs().first().map(holder).transpose()
    }

    fn grant(&mut self, ttl: Millis) -> Result<u64, StoreError> {
        let seconds = i64::try_from(ttl.div_ceil(1000)).unwrap_or(i64::MAX);
        let response = run(&self.runtime, self.client.lease_grant(seconds, None))?;
        Ok(response.id().unsigned_abs())
    }

    fn campaign(&mut self, me: Incarnation, lease: u64) -> Result<Option<KeyHolder>, StoreError> {
        let value = serde_json::to_vec(&me).map_err(StoreError::Record)?;
        let absent = Compare::create_revision(self.key(), CompareOp::Equal, 0);
        let put = TxnOp::put(self.key(), value, Some(PutOptions::new().with_lease(lease_id(lease))));
        let get = TxnOp::get(self.key(), None);
        let txn = Txn::new().when([absent]).and_then([put, get.clone()]).or_else([get]);
        let response = run(&self.runtime, self.client.txn(txn))?;
        let found = response.op_responses().into_iter().find_map(|r| match r {
            TxnOpResponse::Get(get) => get.kvs().first().cloned(),
            _ => None,
        });
        found.as_ref().map(holder).transpose()
    }

    fn renew(&mut self, lease: u64) -> Result<bool, StoreError> {
        let client = &mut self.client;
        run(&self.runtime, async {
            // Opening the stream already renews once.
            match client.lease_keep_alive(lease_id(lease)).await {
                Ok(_) => Ok(true),
                Err(Error::LeaseKeepAliveError(_)) => Ok(false),
                Err(e) => Err(e),
            }
        })
    }

    fn resign(&mut self, lease: u64) -> Result<(), StoreError> {
        run(&self.runtime, self.client.lease_revoke(lease_id(lease))).map(|_| ())
    }
}
