/* ok: answers OK to every line, and does nothing else: what TCP on this machine allows one thread.
 *
 *     ok PORT        one thread, epoll, one read and one write a wake-up, loopback
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHUNK = 64 * 1024, EVENTS = 512 };

static char chunk[CHUNK], answers[3 * CHUNK];

static int fail(const char *what)
{
    perror(what);
    return 1;
}

int main(int count, char **words)
{
    if (count != 2) {
        fputs("usage: ok PORT\n", stderr);
        return 2;
    }
    for (size_t i = 0; i < CHUNK; i++)
        memcpy(answers + 3 * i, "OK\n", 3);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    int on = 1, poller = epoll_create1(0);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(words[1])),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) != 0 || listen(listener, 4096) != 0)
        return fail("ok: cannot listen");
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[EVENTS];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);

    for (;;) {
        int n = epoll_wait(poller, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                event.data.fd = fd = accept(listener, NULL, NULL);
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
                continue;
            }
            ssize_t got = recv(fd, chunk, CHUNK, 0);
            if (got <= 0) {
                close(fd);
                continue;
            }
            size_t lines = 0;
            for (ssize_t j = 0; j < got; j++)
                lines += chunk[j] == '\n';
            /* The generator reads all that it is owed, so a blocking write always ends. */
            for (size_t sent = 0; sent < 3 * lines;) {
                ssize_t put = send(fd, answers + sent, 3 * lines - sent, MSG_NOSIGNAL);
                if (put <= 0)
                    break;
                sent += (size_t)put;
            }
        }
    }
}
