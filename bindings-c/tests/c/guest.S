/* A guest of a few instructions, entered in 64-bit mode: prints "hello" on COM1 and switches itself off by ACPI. */
    .text
    .globl _start
_start:
    lea text(%rip), %rsi
    mov $0x3f8, %dx
    mov $6, %ecx
    rep outsb
    mov $0x604, %dx
    mov $0x3400, %ax
    outw %ax, %dx
1:  hlt
    jmp 1b
text:
    .ascii "hello\n"
    .section .note.GNU-stack, "", @progbits
