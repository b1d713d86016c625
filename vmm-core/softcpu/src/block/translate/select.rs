//! Macros that pick the instance of a generic handler.

/// The instance of a handler for an operand size: `by_size!(size, module::handler, <more generics>)`.
macro_rules! by_size {
    ($size:expr, $($f:ident)::+ $(, $g:ty)*) => {
        match $size {
            1 => $($f)::+::<u8 $(, $g)*> as Handler,
            2 => $($f)::+::<u16 $(, $g)*> as Handler,
            4 => $($f)::+::<u32 $(, $g)*> as Handler,
            _ => $($f)::+::<u64 $(, $g)*> as Handler,
        }
    };
}

/// The same for handlers with a memory operand that are worth a variant for simple addresses.
macro_rules! by_size_hot {
    ($op:expr, $long:expr, $size:expr, $($f:ident)::+ $(, $g:ty)*) => {
        if $long && $op.index == ZERO && $op.seg == ZERO {
            by_size!($size, $($f)::+, Base $(, $g)*)
        } else if $long && $op.seg == ZERO {
            by_size!($size, $($f)::+, Indexed $(, $g)*)
        } else {
            by_size_mem!($long, $size, $($f)::+ $(, $g)*)
        }
    };
}

/// The instance for an operand size of 4 or 8 bytes.
macro_rules! by_wide {
    ($size:expr, $($f:ident)::+ $(, $g:ty)*) => {
        if $size == 4 { $($f)::+::<u32 $(, $g)*> as Handler } else { $($f)::+::<u64 $(, $g)*> as Handler }
    };
}

/// The same for handlers with a memory operand.
macro_rules! by_size_mem {
    ($long:expr, $size:expr, $($f:ident)::+ $(, $g:ty)*) => {
        if $long {
            by_size!($size, $($f)::+, Long $(, $g)*)
        } else {
            by_size!($size, $($f)::+, Legacy $(, $g)*)
        }
    };
}

/// Evaluates an expression with a constant condition code.
macro_rules! by_condition {
    ($c:expr, $C:ident => $e:expr) => {
        by_condition!(@ $c, $C => $e; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $c:expr, $C:ident => $e:expr; $($n:literal)+) => {
        match $c {
            $($n => {
                const $C: u8 = $n;
                $e
            })+
            _ => unreachable!("other condition codes were excluded"),
        }
    };
}

pub(super) use {by_condition, by_size, by_size_hot, by_size_mem, by_wide};
