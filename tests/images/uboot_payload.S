// A kernel of the least size: an arm64 Image that prints one line and then resets, or hangs.
// Symbols from the command line: LETTER (slot), HANG (1: never end).
// Format: Linux Documentation/arm64/booting.rst; PL011 at 0x09000000 and PSCI by hvc: QEMU virt.
    .text
    b    start
    .long 0
    .quad 0x80000           // text offset
    .quad end - .text       // image size
    .quad 0xa               // little endian, 4 KiB pages, anywhere in RAM
    .quad 0, 0, 0
    .ascii "ARM\x64"
    .long 0
start:
    mov  x1, #0x09000000
    adr  x2, message
1:  ldrb w3, [x2], #1
    cbz  w3, 2f
    str  w3, [x1]
    b    1b
2:
.if HANG
    b    2b
.endif
    movz x0, #0x0009        // PSCI SYSTEM_RESET = 0x84000009
    movk x0, #0x8400, lsl #16
    hvc  #0
    b    2b
message:
    .ascii "PAYLOAD "
    .byte LETTER
    .asciz " RUNS\r\n"
    .balign 8
end:
