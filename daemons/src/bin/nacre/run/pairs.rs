//! Option values of the form `key=value,flag,...`.

use std::str::FromStr;

/// What is left of a list of keys. A comma within a value is written twice.
pub struct Pairs(Vec<(String, Option<String>)>);

impl Pairs {
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = vec![String::new()];
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            if c == ',' && chars.next_if_eq(&',').is_none() {
                parts.push(String::new());
            } else if let Some(part) = parts.last_mut() {
                part.push(c);
            }
        }
        let mut pairs: Vec<(String, Option<String>)> = Vec::new();
        for part in parts {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (part, None),
            };
            if key.is_empty() || pairs.iter().any(|(other, _)| *other == key) {
                return Err(format!("{key:?} is empty or given twice"));
            }
            pairs.push((key, value));
        }
        Ok(Self(pairs))
    }

    fn remove(&mut self, key: &str) -> Option<Option<String>> {
        let at = self.0.iter().position(|(k, _)| k == key)?;
        Some(self.0.remove(at).1)
    }

    /// The value of `key`, if it is there and has one.
    pub fn take(&mut self, key: &str) -> Option<String> {
        self.remove(key).flatten()
    }

    /// The value of a key that must be there.
    pub fn required(&mut self, key: &str) -> Result<String, String> {
        self.take(key).filter(|v| !v.is_empty()).ok_or_else(|| format!("{key}=... is missing"))
    }

    /// A number.
    pub fn number<T: FromStr>(&mut self, key: &str) -> Result<Option<T>, String> {
        let Some(text) = self.take(key) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("{key}={text} is not a number in range"))
    }

    /// A key without a value, or with on or off.
    pub fn flag(&mut self, key: &str) -> Result<bool, String> {
        match self.remove(key) {
            None => Ok(false),
            Some(None) => Ok(true),
            Some(Some(value)) if value == "on" => Ok(true),
            Some(Some(value)) if value == "off" => Ok(false),
            Some(Some(value)) => Err(format!("{key}={value}: give on or off")),
        }
    }

    /// Fails when a key is left.
    pub fn finish(self) -> Result<(), String> {
        match self.0.first() {
            Some((key, _)) => Err(format!("{key} is not known here")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_values_and_flags() {
        let mut pairs = Pairs::parse("path=a,,b=c,ro,n=5,x=off").unwrap();
        assert_eq!(pairs.required("path").unwrap(), "a,b=c");
        assert_eq!((pairs.flag("ro"), pairs.flag("x"), pairs.flag("none")), (Ok(true), Ok(false), Ok(false)));
        assert_eq!(pairs.number("n"), Ok(Some(5u8)));
        assert_eq!(pairs.finish(), Ok(()));
        assert!(Pairs::parse("a=1,a=2").is_err());
        assert!(Pairs::parse("a=1,").is_err());
        assert!(Pairs::parse("a=300").unwrap().number::<u8>("a").is_err());
        assert!(Pairs::parse("z").unwrap().finish().is_err());
    }
}
