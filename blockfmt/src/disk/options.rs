//! Options of new images as text.

use super::{CreateOptions, Preallocation};
use crate::format::qcow2::Compression;
use crate::format::vhd::VhdKind;
use crate::format::vhdx::VhdxKind;
use crate::{BackingRef, CipherMode, Error, Format, Hash, IvGenerator, LuksOptions, Result};
use std::str::FromStr;

impl CreateOptions {
    /// Sets what a list names, with the names and values that `qemu-img create -o` has for the image's format:
    /// `cluster_size=128k,extended_l2=on`.
    ///
    /// Fails with [`Error::InvalidOption`] if the format has no such option, or not with this value; what came before in
    /// the list is set then.
    pub fn apply(&mut self, list: &str) -> Result<()> {
        list.split(',').filter(|option| !option.is_empty()).try_for_each(|option| self.apply_one(option))?;
        match &self.backing {
            Some(backing) if backing.path.is_empty() || backing.format.is_none() => {
                invalid("backing_file and backing_fmt go together".into())
            }
            _ => Ok(()),
        }
    }

    fn apply_one(&mut self, option: &str) -> Result<()> {
        use Format::{Luks, Qcow2, Vhd, Vhdx};
        let (format, q) = (self.format, &mut self.qcow2);
        let (key, value) = option.split_once('=').unwrap_or((option, "on"));
        let size = || match parse_size(value) {
            Err(Error::InvalidOption(why)) => invalid(format!("{key}: {why}")),
            result => result,
        };
        let short = || {
            let size = size()?;
            u32::try_from(size).or_else(|_| invalid(format!("{key}: {size} is too large")))
        };
        let flag = || match value {
            "on" | "true" | "yes" => Ok(true),
            "off" | "false" | "no" => Ok(false),
            _ => invalid(format!("{key} is on or off")),
        };
        match (key, format) {
            ("size", _) => self.size = size()?,
            ("backing_file", Qcow2 | Vhd | Vhdx) => {
                let format = self.backing.take().and_then(|backing| backing.format);
                self.backing = Some(BackingRef { path: value.into(), format });
            }
            ("backing_fmt", Qcow2 | Vhd | Vhdx) => {
                let format = value.parse::<Format>()?.name().to_owned();
                let path = self.backing.take().map(|backing| backing.path).unwrap_or_default();
                self.backing = Some(BackingRef { path, format: Some(format) });
            }
            ("preallocation", _) => self.preallocation = value.parse()?,
            ("compat", Qcow2) => match value {
                "0.10" | "v2" => q.version = 2,
                "1.1" | "v3" => q.version = 3,
                _ => return invalid("compat is 0.10 or 1.1".into()),
            },
            ("cluster_size", Qcow2) => q.cluster_size = Some(size()?),
            ("refcount_bits", Qcow2) => q.refcount_bits = short()?,
            ("compression_type", Qcow2) => {
                q.compression = match value {
                    "zlib" => Compression::Zlib,
                    "zstd" => Compression::Zstd,
                    _ => return invalid("compression_type is zlib or zstd".into()),
                }
            }
            ("extended_l2", Qcow2) => q.extended_l2 = Some(flag()?),
            ("lazy_refcounts", Qcow2) => q.lazy_refcounts = flag()?,
            ("data_file", Qcow2) => q.data_file = Some(value.into()),
            ("data_file_raw", Qcow2) => q.data_file_raw = flag()?,
            ("encrypt.format", Qcow2) => match value {
                "luks" => drop(q.encryption.get_or_insert_default()),
                _ => return invalid("encrypt.format is luks".into()),
            },
            (_, Qcow2 | Luks) if luks_key(format, key).is_some() => {
                let luks = match format {
                    Luks => &mut self.luks,
                    _ => q.encryption.get_or_insert_default(),
                };
                apply_luks(luks, luks_key(format, key).unwrap_or(key), value)?;
            }
            ("subformat", Vhd | Vhdx) => {
                (self.vhd.kind, self.vhdx.kind) = match value {
                    "dynamic" => (VhdKind::Dynamic, VhdxKind::Dynamic),
                    "fixed" => (VhdKind::Fixed, VhdxKind::Fixed),
                    _ => return invalid("subformat is dynamic or fixed".into()),
                }
            }
            ("force_size", Vhd) => match flag()? {
                true => {} // as all VHDs are made here
                false => return invalid("force_size=off would round the size to a geometry".into()),
            },
            ("block_size", Vhdx) => self.vhdx.block_size = Some(short()?),
            ("log_size", Vhdx) => self.vhdx.log_size = short()?,
            ("block_state_zero", Vhdx) => self.vhdx.zero_blocks = flag()?,
            ("logical_sector_size", Vhdx) => self.vhdx.logical_sector = short()?,
            _ => return invalid(format!("format {format} has no option {key:?}")),
        }
        Ok(())
    }
}

impl FromStr for Preallocation {
    type Err = Error;
    /// Takes the names of qemu-img.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "off" => Ok(Preallocation::Off),
            "metadata" => Ok(Preallocation::Metadata),
            "falloc" => Ok(Preallocation::Falloc),
            "full" => Ok(Preallocation::Full),
            _ => invalid("preallocation is off, metadata, falloc or full".into()),
        }
    }
}

fn invalid<T>(what: String) -> Result<T> {
    Err(Error::InvalidOption(what))
}

/// Parses a size in bytes with an optional suffix of powers of 1024: K, M, G, T or P.
pub fn parse_size(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        other => return invalid(format!("unknown suffix {other:?}; use K, M, G, T or P")),
    };
    let Ok(number) = digits.parse::<u64>() else { return invalid(format!("{text:?} is not a size")) };
    let size = number.checked_mul(1 << shift).filter(|n| *n <= i64::MAX as u64);
    size.ok_or_else(|| Error::InvalidOption("the size is too large".into()))
}

/// The name of a LUKS option, without the prefix that it has for qcow2.
fn luks_key(format: Format, key: &str) -> Option<&str> {
    let name = if format == Format::Luks { key } else { key.strip_prefix("encrypt.")? };
    ["cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time"]
        .contains(&name)
        .then_some(name)
}

fn apply_luks(luks: &mut LuksOptions, key: &str, value: &str) -> Result<()> {
    match (key, value) {
        ("cipher-alg", "aes-128") => luks.key_bits = 128,
        ("cipher-alg", "aes-256") => luks.key_bits = 256,
        ("cipher-mode", "xts") => luks.mode = CipherMode::Xts,
        ("cipher-mode", "cbc") => luks.mode = CipherMode::Cbc,
        ("ivgen-alg", "plain") => luks.iv = IvGenerator::Plain,
        ("ivgen-alg", "plain64") => luks.iv = IvGenerator::Plain64,
        ("ivgen-alg", "essiv") => luks.iv = IvGenerator::Essiv,
        ("ivgen-hash-alg", "sha256") => {}
        ("hash-alg", "sha1") => luks.hash = Hash::Sha1,
        ("hash-alg", "sha256") => luks.hash = Hash::Sha256,
        ("hash-alg", "sha512") => luks.hash = Hash::Sha512,
        ("iter-time", _) => match value.parse() {
            Ok(time) => luks.iter_time_ms = time,
            Err(_) => return invalid(format!("iter-time is a number of milliseconds, not {value:?}")),
        },
        _ => return invalid(format!("{key} cannot be {value:?}")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, size) in [("10G", 10 << 30), ("512", 512), ("3MiB", 3 << 20)] {
            assert_eq!(parse_size(text).unwrap(), size);
        }
        for bad in ["", "G", "1X", "-1", "99999999999999999999", "9999999P"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn options_have_the_names_of_qemu_img() {
        let mut create = CreateOptions::new(Format::Qcow2, 0);
        create.apply("cluster_size=128k,extended_l2=on").unwrap();
        create.apply("compression_type=zstd,preallocation=metadata").unwrap();
        assert_eq!((create.qcow2.cluster_size, create.qcow2.extended_l2), (Some(131_072), Some(true)));
        assert_eq!(create.preallocation, Preallocation::Metadata);
        for bad in ["colour=red", "refcount_bits=1T", "extended_l2=maybe", "encrypt.iter-time=soon"] {
            assert!(matches!(create.apply(bad), Err(Error::InvalidOption(_))), "{bad}");
        }
        assert!(CreateOptions::new(Format::Raw, 0).apply("cluster_size=64k").is_err());
        create.apply("encrypt.format=luks,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv").unwrap();
        let luks = create.qcow2.encryption.clone().unwrap();
        assert_eq!((luks.mode, luks.iv), (CipherMode::Cbc, IvGenerator::Essiv));
        create.apply("backing_fmt=vhd,backing_file=base").unwrap();
        assert_eq!(create.backing, Some(BackingRef { path: "base".into(), format: Some("vpc".into()) }));
        for half in ["backing_file=base", "backing_fmt=raw"] {
            assert!(CreateOptions::new(Format::Qcow2, 0).apply(half).is_err(), "{half}");
        }
        CreateOptions::new(Format::Vhd, 0).apply("force_size=on").unwrap();
        let mut vhdx = CreateOptions::new(Format::Vhdx, 0);
        vhdx.apply("subformat=fixed,block_size=2M,log_size=4M").unwrap();
        assert_eq!((vhdx.vhdx.kind, vhdx.vhdx.block_size), (VhdxKind::Fixed, Some(2 << 20)));
        assert_eq!(vhdx.vhdx.log_size, 4 << 20);
    }

    #[test]
    fn overlays_have_subclusters_unless_options_say_otherwise() {
        for (list, expected) in [
            ("", (Some(128 << 10), Some(true))),
            ("extended_l2=on", (Some(128 << 10), Some(true))),
            ("extended_l2=off", (None, Some(false))),
            ("compat=0.10", (None, None)),
            ("cluster_size=64k", (Some(64 << 10), None)),
            ("cluster_size=1M,extended_l2=on", (Some(1 << 20), Some(true))),
        ] {
            let mut create = CreateOptions::new(Format::Qcow2, 0);
            create.apply(list).unwrap();
            let qcow2 = create.qcow2.overlay();
            assert_eq!((qcow2.cluster_size, qcow2.extended_l2), expected, "{list}");
        }
    }
}
