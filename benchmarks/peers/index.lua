-- INDEX and REMOVE with pkgindex's rules, as one atomic script: ARGV is the command, the package, its
-- dependencies. p:NAME holds a package's dependencies as text (so that EXISTS p:NAME is QUERY), r:NAME is
-- the set of its dependents. Answers 1 for OK, 0 for FAIL.
local name = ARGV[2]
local old = redis.call('GET', 'p:' .. name)
if ARGV[1] == 'REMOVE' then
    if not old then return 1 end
    local dependents = redis.call('SCARD', 'r:' .. name)
    if dependents - redis.call('SISMEMBER', 'r:' .. name, name) > 0 then return 0 end
    redis.call('DEL', 'p:' .. name)
else
    for i = 3, #ARGV do
        if redis.call('EXISTS', 'p:' .. ARGV[i]) == 0 then return 0 end
    end
    local new = table.concat(ARGV, ',', 3)
    if old == new then return 1 end
    redis.call('SET', 'p:' .. name, new)
end
if old then
    for one in string.gmatch(old, '[^,]+') do redis.call('SREM', 'r:' .. one, name) end
end
if ARGV[1] == 'INDEX' then
    for i = 3, #ARGV do redis.call('SADD', 'r:' .. ARGV[i], name) end
end
return 1
